"""Batches prepared ahead in a thread: shards decoded, documents tokenised and aligned, while the model computes.

A thread and no process: a fork would copy the locks of object-store clients and hang in the child.
"""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
BATCHES_AHEAD = 8
_POLL_SECONDS = 0.1


class Prefetched(Iterator[Item], Generic[Item]):
    """What `source` yields, at most `ahead` items ahead of who asks. waited: seconds that the asker has waited so far.

    What the source raises is raised here, in its turn. `close` ends the thread; it ends by itself with the source.
    """

    def __init__(self, source: Iterator[Item], ahead: int = BATCHES_AHEAD) -> None:
        self.source = source
        self.waited = 0.0
        self._ready: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> Item:
        began = time.perf_counter()
        item, error = self._ready.get()
        self.waited += time.perf_counter() - began
        if error is not None:
            self._ready.put((None, error))  # whoever asks again is told again
            raise error
        return item

    def close(self) -> None:
        """End the thread; waits for the batch it is at."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                entry = (next(self.source), None)
            except BaseException as error:  # StopIteration too: it ends the asker's loop
                entry = (None, error)
            while not self._closed.is_set():
                try:
                    self._ready.put(entry, timeout=_POLL_SECONDS)
                    break
                except queue.Full:
                    continue
            if entry[1] is not None:
                return

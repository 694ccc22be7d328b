"""Batches prepared ahead in threads: shards decoded, documents tokenised and aligned, while the model computes.

Threads and no processes: a fork would copy the locks of object-store clients and hang in the child. What costs most
(tokenising, decompressing, gathering rows) is done outside Python's lock, so threads do run side by side.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Generic, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")
BATCHES_AHEAD = 8
PATIENCE = 5.0  # seconds for each thread; a store may take minutes to say that it does not answer


class Prefetched(Iterator[Made], Generic[Item, Made]):
    """`make` of everything that `source` yields, in its order, at most `ahead` of it more than was asked for.

    `source` is advanced by one thread at a time and in order; what it yields is made into batches side by side. waited:
    seconds that the asker has waited so far. What either raises is raised here, in its turn, and again to whoever asks
    again. `close` ends the threads; they end by themselves with the source.
    """

    def __init__(
        self,
        source: Iterator[Item],
        make: Callable[[Item], Made],
        *,
        threads: int = 1,
        ahead: int = BATCHES_AHEAD,
    ) -> None:
        self.waited = 0.0
        self._source, self._make = source, make
        self._turn = threading.Lock()
        self._room = threading.Semaphore(ahead)
        self._ordered: queue.SimpleQueue[Future[Made]] = queue.SimpleQueue()
        self._ended = False  # by the source, an error or `close`: nothing more is begun
        self._last: Future[Made] | None = None
        self._peeked: deque[Made] = deque()
        self._threads = [threading.Thread(target=self._run, name="prefetch", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def __next__(self) -> Made:
        return self._peeked.popleft() if self._peeked else self._taken()

    def peek(self, count: int) -> list[Made]:
        """What will be asked for next, at most `count` of it; it is kept, beside the `ahead`, until it is asked for."""
        try:
            while len(self._peeked) < count:
                self._peeked.append(self._taken())
        except StopIteration:
            pass
        return list(self._peeked)[:count]

    def _taken(self) -> Made:
        began = time.perf_counter()
        future = self._last or self._ordered.get()
        error = future.exception()
        self.waited += time.perf_counter() - began
        if error is not None:
            self._last = future
            raise error
        self._room.release()
        return future.result()

    def close(self) -> None:
        """End the threads; waits for the batches they are at, not long where a store hangs: they end when it does."""
        self._ended = True
        for _ in self._threads:
            self._room.release()
        for thread in self._threads:
            thread.join(PATIENCE)

    def _run(self) -> None:
        while True:
            self._room.acquire()
            with self._turn:
                if self._ended:
                    self._room.release()  # the other threads shall see it too
                    return
                future: Future[Made] = Future()
                self._ordered.put(future)
                try:
                    item = next(self._source)
                except BaseException as error:  # StopIteration too: it ends the asker's loop
                    self._end(future, error)
                    continue
            try:
                future.set_result(self._make(item))
            except BaseException as error:
                self._end(future, error)

    def _end(self, future: Future[Made], error: BaseException) -> None:
        self._ended = True
        future.set_exception(error)
        self._room.release()

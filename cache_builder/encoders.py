"""Processes that turn scored documents into a shard's bytes, beside the process that drives the engine.

Encoding costs more than a core where a GPU scores 100,000 rows a second, and threads would take the interpreter's lock
from the engine's client just when its next step is due. A shard's rows travel in memory that both processes map
(`parcels`), its bytes as a pickle.
"""

import errno
import os
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any

from cache_builder.interrupts import interrupts_held
from cache_builder.parcels import Parcel, ParcelError, parcel
from storage_specs.document import CachedDocument
from storage_specs.errors import EngineError
from storage_specs.settings import CacheSettings
from storage_specs.shard_record import ShardRecord
from storage_specs.writer import encoded_shard

MOST = 8  # at 50,000 rows a second each (scripts/bench_client.py), more than any single engine scores
FORBIDDEN = (errno.ENOENT, errno.EACCES, errno.EPERM)  # and not: too many open files, no memory just now
CORES_LEFT = 4  # to the engine's own processes

_settings: CacheSettings  # of an encoder's process


def encoder_count(replicas: int) -> int:
    """How many encoders a replica of a GPU engine gets on this machine; 0 where its cores are needed otherwise."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(MOST, (cores - CORES_LEFT) // max(1, replicas)))


class ShardEncoders:
    """`size` processes, started at once; called like `encoded_shard`, by as many threads as there are processes."""

    def __init__(self, settings: CacheSettings, size: int) -> None:
        self.settings, self.size = settings, size
        self.in_memory = True  # until one of them may not read the others' files
        self.pool = ProcessPoolExecutor(size, get_context("spawn"), initializer=_begin, initargs=(settings,))
        with interrupts_held():
            for _ in range(size):
                self.pool.submit(_nothing)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)

    def __call__(
        self, shard: int, documents: Sequence[CachedDocument], settings: CacheSettings, planned_ids: tuple[str, ...]
    ) -> tuple[ShardRecord, dict[str, bytes]]:
        """Raises what `encoded_shard` raises, and EngineError where an encoder's process is gone."""
        if settings is not self.settings:
            raise ValueError("these encoders were started with other settings")
        try:
            try:
                return self._encoded(shard, (documents, planned_ids), self.in_memory)
            except ParcelError as error:
                if self.in_memory and error.errno in FORBIDDEN:
                    self.in_memory = False
                    print(f"rows go to the encoders by a pipe, slower: {error.strerror}", file=sys.stderr)
                return self._encoded(shard, (documents, planned_ids), False)
        except BrokenProcessPool:
            raise EngineError(
                f"shard {shard}: a process that encodes rows died, killed perhaps for want of memory; use smaller "
                "shards (--documents_per_shard), and run the same command again to resume"
            ) from None

    def _encoded(self, shard: int, rows: Any, in_memory: bool) -> tuple[ShardRecord, dict[str, bytes]]:
        with parcel(rows, in_memory) as sent:
            return self.pool.submit(_encode, shard, sent).result()


def _begin(settings: CacheSettings) -> None:
    global _settings
    _settings = settings
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business: it lets shards under way finish
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # one that came meanwhile is forgotten
    if hasattr(os, "nice"):
        os.nice(5)  # the engine's processes come first
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A pool's process holds both ends of its queue, and would wait for a killed parent for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _nothing() -> None:
    """Makes the pool start one more process."""


def _encode(shard: int, sent: Parcel) -> tuple[ShardRecord, dict[str, bytes]]:
    documents, planned_ids = sent.open()
    return encoded_shard(shard, documents, _settings, planned_ids)

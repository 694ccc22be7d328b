"""Rows handed to another process of the same machine, in memory that both map.

A pipe takes 64 KB at a time, for each of which one side wakes the other, and all encoders of a build share one: it is
three to four times as slow (scripts/bench_parcels.py).
"""

import mmap
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

ALIGNMENT = 64  # of every array
NAME = "teach-once-rows"


class ParcelError(OSError):
    """Rows were sent in memory that the other process cannot read: they have to be sent once more, whole."""


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """A pickle whose arrays lie in the file `path`, in this order, `sizes` bytes each. None: they are in the pickle.

    The file is there as long as the sender's `parcel(...)`.
    """

    pickled: bytes
    path: str | None
    sizes: Sequence[int] = ()

    def open(self) -> Any:
        """What was sent; what is written into its arrays nobody else sees. Raises ParcelError where the file cannot be
        read, as where processes may not look at each other."""
        if self.path is None:
            return pickle.loads(self.pickled)
        try:
            with open(self.path, "rb") as file:
                memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        except OSError as error:
            raise ParcelError(error.errno, f"an encoder cannot read {self.path} ({error.strerror})") from error
        arrays, start = [], 0
        for size in self.sizes:
            arrays.append(memory[start : start + size])
            start += size + -size % ALIGNMENT
        return pickle.loads(self.pickled, buffers=arrays)


@contextmanager
def parcel(thing: Any, in_memory: bool = True) -> Iterator[Parcel]:
    """`thing`, ready to be sent to a process of this machine; whole where not `in_memory`, or where there is none."""
    arrays: list[memoryview] = []
    keep = (lambda buffer: arrays.append(buffer.raw())) if in_memory else None
    pickled = pickle.dumps(thing, protocol=5, buffer_callback=keep)
    number = _in_memory(arrays) if arrays else None
    if number is None:
        yield Parcel(pickled=pickle.dumps(thing, protocol=5) if arrays else pickled, path=None)
        return
    try:
        path = f"/proc/{os.getpid()}/fd/{number}"
        yield Parcel(pickled=pickled, path=path, sizes=[len(array) for array in arrays])
    finally:
        os.close(number)


def _in_memory(arrays: Sequence[memoryview]) -> int | None:
    """A file in memory that holds them, which needs no /dev/shm; None where there is none, or no room in it."""
    try:
        number = os.memfd_create(NAME)
    except (AttributeError, OSError):
        return None
    try:
        with open(number, "wb", closefd=False) as file:
            for array in arrays:
                file.write(array)
                file.write(bytes(-len(array) % ALIGNMENT))
            file.write(bytes(1))  # nothing cannot be mapped
    except OSError:
        os.close(number)
        return None
    return number

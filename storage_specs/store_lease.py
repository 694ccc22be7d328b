"""The lease of a cache in an object store: an object that its holder keeps young, as stores have no locks.

`.writing/lease-000007` names host and process. Whoever wants to write creates the next number, which only one can, and
then looks at the others. If a lower one is alive, he takes his own back. If a higher one is, he waits for it to do so,
and takes his own back where it stays: its holder came while a still lower one, since gone, stood there, and saw nobody
when he looked. If all are gone, he has the cache. Gone is a process of this host that does not run any more, and any
other whose object has not been written again for LEASE_SECONDS by the store's clock.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from storage_specs.document import canonical_json
from storage_specs.errors import CacheInUseError, CorruptCacheError, TeachOnceError
from storage_specs.local_objects import WRITING_FOLDER, process_is_alive
from storage_specs.objects import Objects

LEASE_SECONDS = 120
BEAT_SECONDS = 20
YIELDING_SECONDS = (0.1, 0.4, 1.5)  # after which others are looked at again
_PREFIX = f"{WRITING_FOLDER}/lease-"
_held: set[str] = set()  # by this process


@contextmanager
def store_lease(objects: Objects) -> Iterator[None]:
    """Hold a cache in an object store. Raises CacheInUseError, and what the store raises."""
    own = uuid.uuid4().hex
    data = canonical_json({"host": socket.gethostname(), "process": os.getpid(), "lease": own})
    ended = threading.Event()
    _held.add(own)
    try:
        name = _acquire(objects, data)
        beat = threading.Thread(target=_keep_young, args=(objects, name, data, ended), daemon=True)
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            with suppress(TeachOnceError):  # it grows old
                objects.delete(name)
    finally:
        _held.discard(own)


def _acquire(objects: Objects, data: bytes) -> str:
    """The name of our lease."""
    number = max((int(name.removeprefix(_PREFIX)) for name, _ in objects.list(_PREFIX)), default=0) + 1
    ours = f"{_PREFIX}{number:06d}"
    if not objects.create(ours, data):
        raise _in_use(objects, "another process, which was faster,")
    clock = objects.age(ours) or 0.0  # how far the store's clock is from ours
    for pause in (*YIELDING_SECONDS, None):
        others = _living(objects, ours, clock)
        if not others:
            return ours
        name, holder = others[0]
        if name < ours or pause is None:
            objects.delete(ours)
            raise _in_use(objects, f"process {holder['process']} of the machine {holder['host']}")
        time.sleep(pause)
    raise AssertionError  # the last pause is None


def _living(objects: Objects, ours: str, clock: float) -> list[tuple[str, dict]]:
    """The other leases whose holders are there, in order; what the others left is removed."""
    living = []
    for name in sorted(name for name, _ in objects.list(_PREFIX) if name != ours):
        holder, age = _holder(objects, name), objects.age(name)
        if holder is not None and age is not None and _is_there(holder, age - clock):
            living.append((name, holder))
        else:
            objects.delete(name)
    return living


def _holder(objects: Objects, name: str) -> dict | None:
    try:
        holder = json.loads(objects.read(name))
        return holder if {"host", "process", "lease"} <= set(holder) else None
    except (CorruptCacheError, ValueError, TypeError):  # given back meanwhile, or none of ours
        return None


def _is_there(holder: dict, age: float) -> bool:
    if holder["lease"] in _held:
        return True
    if holder["host"] == socket.gethostname():
        return process_is_alive(holder["process"])
    return age <= LEASE_SECONDS


def _in_use(objects: Objects, who: str) -> CacheInUseError:
    return CacheInUseError(
        f"{objects.place}: {who} is writing this cache; wait for it, or choose another place (if that machine is gone, "
        f"its claim ends {LEASE_SECONDS} seconds after its last sign)"
    )


def _keep_young(objects: Objects, name: str, data: bytes, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with suppress(TeachOnceError):  # the next beat may get through
            objects.write_all({name: data})

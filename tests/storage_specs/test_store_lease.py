"""The lease of a cache in an object store: one writer at a time, and none for long after a kill."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from object_stores import S3
from small_caches import some_documents, some_settings, write_cache

from storage_specs import store_lease, verify_cache
from storage_specs.errors import CacheInUseError
from storage_specs.lease import lease
from storage_specs.object_roots import open_objects

HOLD = (
    "import sys, time\n"
    "from storage_specs.lease import lease\n"
    "from storage_specs.object_roots import open_objects\n"
    "with lease(open_objects(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(600)\n"
)


def leases(place: str) -> list[str]:
    return sorted(name for name, _ in open_objects(place).list(".writing/"))


def test_one_process_at_a_time_and_none_after_a_kill(s3: S3) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLD, s3.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        refused = rf"s3://.*: process {holder.pid} of the machine .* is writing this cache"
        for _ in range(2):
            with pytest.raises(CacheInUseError, match=refused), lease(open_objects(s3.url)):
                pass
        assert leases(s3.url) == [".writing/lease-000001"]
        with lease(open_objects(s3.url), shared=True):
            pass
        with lease(open_objects(f"{s3.url}/elsewhere")):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert list(open_objects(s3.url).list()) == []
    with lease(open_objects(s3.url)):
        assert leases(s3.url) == [".writing/lease-000002"]
        with pytest.raises(CacheInUseError), lease(open_objects(s3.url)):
            pass
    assert leases(s3.url) == []


def test_another_machine_has_two_minutes(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = open_objects(s3.url)
    theirs = {"host": f"not-{socket.gethostname()}", "process": 1, "lease": "x"}
    objects.write_all({".writing/lease-000004": json.dumps(theirs).encode()})
    with pytest.raises(CacheInUseError, match=r"its claim ends 120 seconds after its last sign"), lease(objects):
        pass
    monkeypatch.setattr(store_lease, "LEASE_SECONDS", -2)
    with lease(objects):
        assert leases(s3.url) == [".writing/lease-000005"]
    objects.write_all({".writing/lease-000004": b"nonsense"})
    with lease(objects):
        assert leases(s3.url) == [".writing/lease-000005"]


def test_the_holder_shows_that_it_lives(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_lease, "BEAT_SECONDS", 0.01)
    with lease(open_objects(s3.url)):
        s3.proxy.fail("refuse", method="PUT", path="lease", times=3)
        before, deadline = s3.proxy.count("PUT", "lease"), time.monotonic() + 120
        while s3.proxy.count("PUT", "lease") < before + 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert s3.proxy.count("PUT", "lease") >= before + 8
    assert leases(s3.url) == []


def test_a_claim_that_comes_late_gives_way_to_the_holder_above_it(s3: S3) -> None:
    """It found the place free; before its object stands another one is given back, and a third comes by and holds."""
    late, third = open_objects(s3.url), open_objects(s3.url)
    create_late, create_third = late.create, third.create
    with ExitStack() as held:

        def come_by(name: str, data: bytes) -> bool:
            other = held.enter_context(ExitStack())
            other.enter_context(lease(open_objects(s3.url)))
            third.create = lambda *wanted: other.close() or create_third(*wanted)
            held.enter_context(lease(third))
            assert leases(s3.url) == [".writing/lease-000002"]
            return create_late(name, data)

        late.create = come_by
        with pytest.raises(CacheInUseError, match="is writing this cache"), lease(late):
            pass
        assert leases(s3.url) == [".writing/lease-000002"]
    assert leases(s3.url) == []


def test_the_lower_of_two_claims_waits_for_the_higher_one_to_go(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    objects, lower = open_objects(s3.url), open_objects(s3.url)
    theirs = {"host": f"not-{socket.gethostname()}", "process": 1, "lease": "x"}
    higher = {".writing/lease-000002": json.dumps(theirs).encode()}
    create = lower.create
    lower.create = lambda name, data: objects.write_all(higher) or create(name, data)
    monkeypatch.setattr(store_lease, "time", SimpleNamespace(sleep=lambda _: objects.delete(*higher)))
    with lease(lower):
        assert leases(s3.url) == [".writing/lease-000001"]


def test_of_many_at_once_at_most_one(s3: S3) -> None:
    start, held = threading.Barrier(6), []

    def write(number: int) -> None:
        start.wait()
        with suppress(CacheInUseError), lease(open_objects(s3.url)):
            held.append(number)
            write_cache(s3.url, some_documents(2), some_settings("arrow"))
            assert held == [number]
            held.remove(number)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(write, range(6)))
    assert leases(s3.url) == []
    with lease(open_objects(s3.url)):
        write_cache(s3.url, some_documents(2), some_settings("arrow"))
    assert verify_cache(s3.url).ok

"""Two processes write the same shards of one cache, with other values: what ends up there is of one of them, whole."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from small_caches import STORES, some_documents, some_settings

from storage_specs import CacheWriter, make_plan, planned_cache
from storage_specs.lease import commit_turn
from storage_specs.local_objects import LocalObjects
from storage_specs.objects import Objects
from storage_specs.reader import open_cache
from storage_specs.verification import verify_cache

SHARDS = 12
# argv: output, store, whose values. "ready" is printed, and one line waited for, so that both start together, and
# neither finds the other's cache finished when it first looks.
WRITE = """
import dataclasses, sys
from small_caches import some_documents, some_settings
from storage_specs import CacheWriter, make_plan
output, store, mine = sys.argv[1], sys.argv[2], float(sys.argv[3])
documents = some_documents(48, words=60)
plan = make_plan(documents, 4)
documents = [dataclasses.replace(one, gold_logprob=one.gold_logprob * 0 - mine) for one in documents]
writer = CacheWriter(output, some_settings(store=store), plan)
print("ready", flush=True)
sys.stdin.readline()
for shard in range(len(plan.shards)):
    writer.write_shard(shard, documents[shard * 4 : shard * 4 + 4])
writer.finalize()
"""

# argv: a folder that is swept until we are killed.
SWEEP = """
import sys, time
from storage_specs.local_objects import LocalObjects
print("ready", flush=True)
while True:
    LocalObjects(sys.argv[1]).sweep()
    time.sleep(0.001)
"""


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("attempt", range(3))
def test_every_shard_is_of_one_writer_and_the_cache_is_whole(tmp_path: Path, store: str, attempt: int) -> None:
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parents[1]}:{here}"}
    command = [sys.executable, "-c", WRITE, str(tmp_path / "cache"), store]
    writers = [
        subprocess.Popen(
            [*command, value], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment,
        )
        for value in ("1", "2")
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    outs = [writer.communicate(timeout=300) for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], outs
    assert verify_cache(tmp_path / "cache").ok
    cache = open_cache(tmp_path / "cache")
    assert len(cache.documents_per_shard) == SHARDS
    for shard in range(SHARDS):
        values = np.concatenate([document.gold_logprob for document in cache.shard(shard)])
        assert len(np.unique(values)) == 1
        np.testing.assert_allclose(np.abs(values - np.round(values)), 0, atol=1e-3)


def test_a_shard_that_came_in_between_stays_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    documents = some_documents(4)
    plan = make_plan(documents, 2)
    first, second = (CacheWriter(tmp_path / "cache", some_settings(), plan) for _ in range(2))
    record = first.write_shard(0, documents[:2])
    before = (tmp_path / "cache" / record.name).stat().st_mtime_ns
    second.write_shard(0, documents[:2])
    assert (tmp_path / "cache" / record.name).stat().st_mtime_ns == before
    victim = tmp_path / "cache" / record.objects[0].name
    victim.write_bytes(victim.read_bytes()[:-1])
    third = CacheWriter(tmp_path / "cache", some_settings(), plan)
    third.write_shard(0, documents[:2])
    assert (tmp_path / "cache" / record.name).stat().st_mtime_ns > before
    third.write_shard(1, documents[2:])
    third.finalize()
    second.write_shard(1, documents[2:])  # a late worker finds its shard done, and the cache finished
    assert verify_cache(tmp_path / "cache").ok


def test_who_waits_for_its_turn_to_finish_finds_the_cache_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = some_documents(4)
    plan = make_plan(documents, 2)
    first, second = (CacheWriter(tmp_path / "cache", some_settings(), plan) for _ in range(2))
    for shard in range(2):
        first.write_shard(shard, documents[2 * shard : 2 * shard + 2])

    @contextmanager
    def after_the_other(objects: Objects) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(planned_cache, "commit_turn", commit_turn)
            first.finalize()
        with commit_turn(objects):
            yield

    monkeypatch.setattr(planned_cache, "commit_turn", after_the_other)
    assert second.finalize() == open_cache(tmp_path / "cache").manifest


def test_a_folder_that_others_sweep_all_the_time_is_written_to(tmp_path: Path) -> None:
    """Every sweep removes the folder of files being written where it sees it empty."""
    objects = LocalObjects(tmp_path)
    sweeper = subprocess.Popen([sys.executable, "-c", SWEEP, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert sweeper.stdout is not None
        assert sweeper.stdout.readline() == b"ready\n"
        for number in range(1000):
            objects.write_all({f"{number}": b"data"})
        assert sweeper.poll() is None
    finally:
        sweeper.kill()
        sweeper.communicate()
    assert len(list(objects.list())) == 1000


@pytest.mark.parametrize("store", STORES)
def test_a_commit_lists_nothing(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing takes longer with every shard that is there: a build of many would slow down more and more."""
    documents = some_documents(12)
    writer = CacheWriter(tmp_path / "cache", some_settings(store=store), make_plan(documents, 4))
    with monkeypatch.context() as patch:
        patch.setattr(LocalObjects, "list", None)
        for shard in range(3):
            writer.write_shard(shard, documents[4 * shard : 4 * shard + 4])
    writer.finalize()
    assert verify_cache(tmp_path / "cache").ok


def test_others_commit_while_a_shard_goes_to_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = some_documents(8)
    writer = CacheWriter(tmp_path / "cache", some_settings(), make_plan(documents, 4))
    waiting, free, sync = threading.Event(), threading.Event(), os.fsync

    def slow_sync(descriptor: int) -> None:
        if threading.current_thread().name == "slow":
            waiting.set()
            assert free.wait(60)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow_sync)
    slow = threading.Thread(target=writer.write_shard, args=(0, documents[:4]), name="slow")
    slow.start()
    assert waiting.wait(60)
    writer.write_shard(1, documents[4:])  # would wait for ever for its turn, were it not free
    assert writer.absent_shards() == 1
    free.set()
    slow.join()
    writer.finalize()
    assert verify_cache(tmp_path / "cache").ok

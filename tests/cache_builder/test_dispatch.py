"""Who gets which shard: all of them are done once, whoever dies, and errors that everybody would meet end it."""

import random

import pytest

from cache_builder.dispatch import JOBS_PER_WORKER, dispatch
from cache_builder.pipeline import Job
from cache_builder.progress import Work
from storage_specs.errors import DeviceMemoryError, EngineError, TokenizerError


class FakePool:
    """Workers finish in random order; worker w dies with its n-th job where deaths[w] == n."""

    def __init__(self, size: int, deaths: dict[int, int], error: Exception | None = None) -> None:
        self.size, self.deaths, self.error = size, deaths, error
        self.queues: dict[int, list[int]] = {worker: [] for worker in range(size)}
        self.finished = dict.fromkeys(range(size), 0)
        self.dead: set[int] = set()
        self.deepest = 0
        self.random = random.Random(size)

    def start(self, worker: int, job: Job) -> None:
        assert worker not in self.dead
        self.queues[worker].append(job[0])
        self.deepest = max(self.deepest, len(self.queues[worker]))

    def wait(self) -> tuple[int, int | None, Work | Exception]:
        worker = self.random.choice([number for number, queue in self.queues.items() if queue])
        if self.deaths.get(worker) == self.finished[worker]:
            self.dead.add(worker)
            self.queues[worker].clear()
            return worker, None, self.error or EngineError(f"worker {worker} is dead")
        self.finished[worker] += 1
        return worker, self.queues[worker].pop(0), Work(tokens=1)


@pytest.mark.parametrize(
    ("size", "deaths"), [(1, {}), (3, {}), (3, {0: 0}), (3, {0: 2, 2: 0}), (5, {n: n for n in range(4)})]
)
def test_every_shard_is_done_once(size: int, deaths: dict[int, int], capsys: pytest.CaptureFixture[str]) -> None:
    done: list[int] = []
    pool = FakePool(size, deaths)
    dispatch([(shard, ()) for shard in range(20)], pool, lambda shard, work: done.append(shard))
    assert sorted(done) == list(range(20))
    assert pool.deepest <= JOBS_PER_WORKER
    lost = capsys.readouterr().err.splitlines()
    assert len(lost) == len(pool.dead)
    assert all("is lost, others go on: worker" in line for line in lost)


def test_the_last_workers_error_is_raised() -> None:
    with pytest.raises(EngineError, match="is dead"):
        dispatch([(shard, ()) for shard in range(20)], FakePool(2, {0: 1, 1: 3}), lambda *_: None)


def test_a_worker_without_memory_is_lost_alone(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[int] = []
    pool = FakePool(3, {1: 2}, DeviceMemoryError("out of memory"))
    dispatch([(shard, ()) for shard in range(20)], pool, lambda shard, work: done.append(shard))
    assert sorted(done) == list(range(20))
    assert capsys.readouterr().err == "worker 1 is lost, others go on: out of memory\n"


def test_an_error_that_all_would_meet_is_raised_at_once() -> None:
    pool = FakePool(3, {1: 0}, TokenizerError("no such word"))
    with pytest.raises(TokenizerError, match="no such word"):
        dispatch([(shard, ()) for shard in range(20)], pool, lambda *_: None)


def test_nothing_to_do() -> None:
    dispatch([], FakePool(2, {}), lambda *_: pytest.fail("nothing was asked for"))

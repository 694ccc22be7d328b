"""Shards go to whichever worker is free; what a dead worker had open goes to another.

Local replicas and the actors of a Ray cluster are two kinds of `Pool`.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from cache_builder.pipeline import Job
from cache_builder.progress import Work
from storage_specs.errors import DeviceMemoryError, EngineError

LOST = (EngineError, DeviceMemoryError)  # of one worker: others may have what it lacks
JOBS_PER_WORKER = 3  # what it writes, what it scores, and the next: it never waits for us


class Pool(Protocol):
    """Workers by number, from 0 to `size` - 1."""

    size: int

    def start(self, worker: int, job: Job) -> None:
        """Hand a job to a worker, which does its jobs in order; a dead worker's are reported by `wait`."""

    def wait(self) -> tuple[int, int | None, Work | Exception]:
        """Block until there is news of a worker: (worker, shard, Work) of a finished shard, or (worker, None, error).

        One of LOST means that the worker is lost; any other error is one that every worker would meet.
        """


def dispatch(jobs: Iterable[Job], pool: Pool, done: Callable[[int, Work], None]) -> None:
    """Have every job done by some worker; `done(shard, work)` after each.

    A lost worker is named on stderr and its open shards are given to the others. Raises what a worker raised, and the
    error of the last worker where all are lost.
    """
    coming, given_back = iter(jobs), deque[Job]()
    open_jobs: dict[int, dict[int, Job]] = {worker: {} for worker in range(pool.size)}

    def fill() -> None:
        for depth in range(1, JOBS_PER_WORKER + 1):  # one for everybody before a second for anybody
            for worker, mine in open_jobs.items():
                while len(mine) < depth:
                    job = given_back.popleft() if given_back else next(coming, None)
                    if job is None:
                        return
                    mine[job[0]] = job
                    pool.start(worker, job)

    fill()
    while any(open_jobs.values()):
        worker, shard, outcome = pool.wait()
        if isinstance(outcome, Work):
            del open_jobs[worker][shard]
            done(shard, outcome)
        elif isinstance(outcome, LOST):
            given_back.extend(open_jobs.pop(worker, {}).values())
            if not open_jobs:
                raise outcome
            print(
                f"worker {worker} is lost, others go on: {' '.join(str(outcome).split())}", file=sys.stderr, flush=True
            )
        else:
            raise outcome
        fill()

"""Replicas of the teacher on one machine: a process each, with GPUs of its own where there are any.

A replica is told its shards through a pipe and answers with what it did. When the parent is gone the pipe ends, and
the replica with it, after the shard that it is at.
"""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from cache_builder.interrupts import interrupted_once, interrupts_held
from cache_builder.pipeline import Job
from cache_builder.progress import Progress, Work
from cache_builder.shard_worker import Recipe, ShardWorker
from storage_specs.errors import ConfigError, EngineError, TeachOnceError

PATIENCE = 15.0  # seconds for a replica to leave, its engine's own processes included, before it is killed


@contextmanager
def replicas(recipe: Recipe, size: int, gpus: int) -> Iterator["ReplicaPool"]:
    """`size` replicas with `gpus` GPUs each, gone afterwards. Raises ConfigError where there are not enough GPUs."""
    pool = ReplicaPool(size)
    patience = 0.5
    try:
        pool.open(recipe, _devices(size, gpus))
        yield pool
        patience = PATIENCE  # they have nothing to do, and leave by themselves; vLLM takes a while
    finally:
        pool.close(patience)


class ReplicaPool:
    """A `dispatch.Pool` of processes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.news: list[tuple[int, int | None, Work | Exception]] = []
        self.pipes: dict[Connection, int] = {}
        self.processes: list[Any] = []
        self.starting = set(range(size))  # they have done nothing, and hold interrupts back

    def open(self, recipe: Recipe, devices_of: list[str | None]) -> None:
        """Start every replica, with the GPUs that it may see."""
        spawn = multiprocessing.get_context("spawn")  # a fork of a process that has used CUDA or threads is not safe
        with interrupts_held():
            for worker, devices in enumerate(devices_of):
                ours, theirs = spawn.Pipe()
                arguments = (theirs, recipe.of_worker(worker))
                process = spawn.Process(target=_replica, args=arguments, name=f"replica-{worker}")
                with _environment(devices):
                    process.start()
                theirs.close()
                self.pipes[ours] = worker
                self.processes.append(process)

    def start(self, worker: int, job: Job) -> None:
        pipe = next((pipe for pipe, number in self.pipes.items() if number == worker), None)
        try:
            if pipe is not None:
                pipe.send(job)
        except OSError:
            pass  # it has died: its pipe, at its end, says so to `wait`

    def wait(self) -> tuple[int, int | None, Work | Exception]:
        while not self.news:
            for pipe in wait(list(self.pipes)):
                worker = self.pipes[pipe]
                try:
                    if (told := pipe.recv()) is not None:
                        self.news.append((worker, *told))
                    self.starting.discard(worker)
                except (EOFError, OSError):
                    del self.pipes[pipe]
                    self.processes[worker].join(PATIENCE)
                    code = self.processes[worker].exitcode
                    self.news.append((worker, None, EngineError(f"replica {worker} died with exit code {code}")))
        return self.news.pop(0)

    def close(self, patience: float) -> None:
        """End all replicas: those that have not left after `patience` seconds, in the middle of what they do."""
        for pipe, worker in self.pipes.items():
            if pipe.poll():
                self.starting.discard(worker)
            pipe.close()
        for worker, process in enumerate(self.processes):
            process.join(patience)
            if process.is_alive():
                os.kill(process.pid, signal.SIGTERM if worker in self.starting else signal.SIGINT)
        for process in self.processes:
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()


class _Jobs:
    """What has come through the pipe. It ends where nothing has come yet, and may go on later."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def __iter__(self) -> "_Jobs":
        return self

    def __next__(self) -> Job:
        if not self.pipe.poll():
            raise StopIteration
        return self.pipe.recv()


def _replica(pipe: Connection, recipe: Recipe) -> None:
    """A replica's whole life. Errors travel as exceptions; a lost parent or Ctrl-C end it quietly."""
    try:
        with interrupted_once():
            _serve(pipe, recipe)
    except KeyboardInterrupt:
        return


def _serve(pipe: Connection, recipe: Recipe) -> None:
    try:
        pipe.send(None)
        # vLLM's core process outlives a parent that only ends, and keeps the GPU
        with closing(ShardWorker(recipe)) as worker, closing(worker.engine):
            while True:
                pipe.poll(None)
                worker.run(_Jobs(pipe), lambda shard, work: pipe.send((shard, work)), Progress(0, 0, 0))
    except EOFError:
        return
    except TeachOnceError as error:
        _tell(pipe, error)
    except Exception as error:  # a bug, or what an engine raises past its own nets: the other replicas go on
        _tell(pipe, EngineError(f"a replica failed: {type(error).__name__}: {error}"))


def _tell(pipe: Connection, error: TeachOnceError) -> None:
    with suppress(OSError):  # the parent is gone, which may have been the error: a pipe it left unread is reset
        pipe.send((None, error))


def _devices(size: int, gpus: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of every replica: consecutive slices of the parent's; None where there is no GPU."""
    from cache_builder.engines import gpu_count

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = gpu_count()
    if not found:
        return [None] * size
    names = [name.strip() for name in visible.split(",")][:found] if visible else list(map(str, range(found)))
    if len(names) < size * gpus:
        raise ConfigError(
            f"data_parallel_size is {size} with {gpus} GPUs each, but {len(names)} GPUs are visible: lower it, or "
            "lower tensor_parallel_size or pipeline_parallel_size"
        )
    return [",".join(names[worker * gpus : (worker + 1) * gpus]) for worker in range(size)]


@contextmanager
def _environment(devices: str | None) -> Iterator[None]:
    """What a process started inside inherits."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    try:
        yield
    finally:
        if devices is not None:
            os.environ.pop("CUDA_VISIBLE_DEVICES")
            if before is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = before

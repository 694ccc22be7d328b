"""Workers as actors of a Ray cluster: the one that RAY_ADDRESS or this machine names, or a new local one.

Every node must see the teacher's folder and the cache's folder under the same paths.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cache_builder.dispatch import LOST
from cache_builder.pipeline import Job
from cache_builder.progress import Progress, Work
from cache_builder.shard_worker import Recipe, ShardWorker
from storage_specs.errors import ConfigError, EngineError, TeachOnceError


@contextmanager
def ray_actors(recipe: Recipe, size: int, gpus: int) -> Iterator["RayPool"]:
    """`size` actors, with `gpus` GPUs each where the cluster has any.

    Raises EngineError without Ray or its cluster, ConfigError where that has no room for so many.
    """
    try:
        import ray
    except ImportError as error:
        raise EngineError(f"--launcher ray needs Ray ({error}): pip install '.[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # no cluster at RAY_ADDRESS, another version of Ray there, no room to start one
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise EngineError(f"Ray gives no cluster ({said:.300}): see to RAY_ADDRESS, or unset it") from None
    try:
        yield RayPool(recipe, size, gpus)
    finally:
        if ours:
            ray.shutdown()


class RayPool:
    """A `dispatch.Pool` of actors."""

    def __init__(self, recipe: Recipe, size: int, gpus: int) -> None:
        import ray

        self.size = size
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        kind, needed = ("GPU", gpus) if any(node.get("GPU") for node in nodes) else ("CPU", 1)
        room = sum(int(node.get(kind, 0) // needed) for node in nodes)
        if room < size:
            raise ConfigError(
                f"data_parallel_size is {size} with {needed} {kind}s each, but Ray's nodes have room for {room} "
                "actors, and would let the others wait for ever: lower it, or add nodes"
            )
        resources = {f"num_{kind.lower()}s": needed}
        shared = ray.put(recipe)
        actor = ray.remote(**resources)(_Actor)
        self.actors = [actor.remote(shared, number) for number in range(size)]
        self.open: dict[Any, tuple[int, int]] = {}

    def start(self, worker: int, job: Job) -> None:
        self.open[self.actors[worker].run.remote(job)] = (worker, job[0])

    def wait(self) -> tuple[int, int | None, Work | Exception]:
        import ray

        (ready, *_), _ = ray.wait(list(self.open), num_returns=1)
        worker, shard = self.open.pop(ready)
        try:
            work, error = ray.get(ready)
        except ray.exceptions.RayError as lost:
            work, error = None, EngineError(f"Ray lost an actor: {type(lost).__name__}")
        if error is None:
            return worker, shard, work
        if isinstance(error, LOST):
            for reference in [reference for reference, (number, _) in self.open.items() if number == worker]:
                del self.open[reference]
            ray.kill(self.actors[worker])
        return worker, None, error


class _Actor:
    """Runs in a process of the cluster."""

    def __init__(self, recipe: Recipe, number: int) -> None:
        self.recipe = recipe.of_worker(number)
        self.worker: ShardWorker | None = None

    def run(self, job: Job) -> tuple[Work | None, Exception | None]:
        """Typed errors are returned, because Ray would wrap what is raised."""
        finished: list[Work] = []
        try:
            if self.recipe.engine != "server" and not Path(self.recipe.engine_config.model).is_dir():
                raise EngineError(
                    f"this node has no folder {self.recipe.engine_config.model}: put it on shared storage"
                )
            self.worker = self.worker or ShardWorker(self.recipe)
            self.worker.run([job], lambda shard, work: finished.append(work), Progress(0, 0, 0))
        except TeachOnceError as error:
            return None, error
        except Exception as error:
            return None, EngineError(f"a worker failed: {type(error).__name__}: {error}")
        return finished[0], None

"""`build`: corpus -> plan -> for every missing shard: windows -> scores -> rows -> shard; then the manifest.

The plan is static and every shard is an idempotent job, so the same call resumes whatever an interruption left.
"""

import time
from contextlib import closing
from dataclasses import dataclass

from cache_builder.build_config import BuildConfig
from cache_builder.dispatch import dispatch
from cache_builder.extension import take_over_base
from cache_builder.preparation import prepare
from cache_builder.progress import Progress, Work
from cache_builder.ray_launcher import ray_actors
from cache_builder.replicas import replicas
from cache_builder.shard_worker import ShardWorker
from storage_specs.lease import lease
from storage_specs.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What one call did; a resumed build, or one of some shards, did only part of what the cache holds.

    manifest: None where shards that are not this call's business are missing; shards_missing counts them.
    """

    manifest: Manifest | None
    shards_written: int
    shards_missing: int
    work: Work
    seconds: float


def build(config: BuildConfig) -> BuildReport:
    """Build, resume or confirm the cache at `config.output`, or those of its shards that `config.shard_range` names.

    The teacher's weights are loaded only if a shard is missing. Whoever finds all shards there writes the manifest.
    Raises CorpusError, ConfigError, TokenizerError, ChatTemplateError, EngineError, DeviceMemoryError, DriftError,
    CacheMismatchError, CacheInUseError, OutputFolderError, StorageFullError; finished shards are kept.
    """
    started = time.monotonic()
    prepared = prepare(config)
    writer = prepared.recipe.writer()
    with lease(writer.objects, shared=config.shard_range is not None), closing(prepared.engine):
        shards = config.shards_of(prepared.plan)
        missing = writer.missing_shards(shards)
        if prepared.base is not None:
            missing = take_over_base(writer, prepared.base, missing)
        work = Work()
        with Progress(prepared.characters(missing), len(shards) - len(missing), len(shards)) as progress:

            def done(shard: int, of_shard: Work) -> None:
                work.add(of_shard)
                progress.shard_done()

            def done_elsewhere(shard: int, of_shard: Work) -> None:
                progress.tokens(of_shard.tokens)
                for document in prepared.members(shard):
                    progress.document_done(document)
                progress.shard_scored()
                done(shard, of_shard)

            jobs = ((shard, prepared.members(shard)) for shard in missing)
            if config.launcher == "local" and config.data_parallel_size == 1:
                with closing(ShardWorker(prepared.recipe, prepared.engine, writer)) as worker:
                    worker.run(jobs, done, progress)
            elif missing:
                pool = replicas if config.launcher == "local" else ray_actors
                size = min(config.data_parallel_size, len(missing))
                with pool(prepared.recipe, size, config.gpus_per_replica) as workers:
                    dispatch(jobs, workers, done_elsewhere)
        absent = 0 if config.shard_range is None else writer.absent_shards()
        return BuildReport(
            manifest=None if absent else writer.finalize(),
            shards_written=len(missing),
            shards_missing=absent,
            work=work,
            seconds=time.monotonic() - started,
        )

"""One worker: scores shards of the plan and writes them, in whatever process and order it is given them.

A build in one process, its replicas and the actors of a Ray cluster all run this.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cache_builder.engines import make_engine
from cache_builder.engines.base import Engine, EngineConfig
from cache_builder.progress import Progress, Work
from cache_builder.rows import Cutter, cached_document
from storage_specs.document import CachedDocument, Document
from storage_specs.plan import Plan
from storage_specs.writer import CacheSettings, CacheWriter

Job = tuple[int, Sequence[Document]]  # a shard's number and its documents


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a worker must know beside its shards' documents; may be pickled. output: the cache's folder."""

    output: Path
    settings: CacheSettings
    plan: Plan
    engine: str
    engine_config: EngineConfig
    cutter: Cutter

    def writer(self) -> CacheWriter:
        """Claims the folder, or finds the same plan there. Raises what `CacheWriter` raises."""
        return CacheWriter(self.output, self.settings, self.plan)


class ShardWorker:
    """Its teacher is loaded with the first shard. `engine`, `writer`: those that the process already has."""

    def __init__(self, recipe: Recipe, engine: Engine | None = None, writer: CacheWriter | None = None) -> None:
        self.recipe = recipe
        self.engine = engine or make_engine(recipe.engine, recipe.engine_config)
        self.writer = writer or recipe.writer()

    def run(self, jobs: Iterable[Job], done: Callable[[int, Work], None], progress: Progress) -> None:
        """Score and write every job; `done(shard, work)` after each, once its record stands.

        Raises EngineError, TokenizerError, ChatTemplateError, StorageFullError, OutputFolderError.
        """
        for shard, documents in jobs:
            work = Work()
            self.writer.write_shard(shard, self.score(documents, work, progress))
            done(shard, work)

    def score(self, documents: Sequence[Document], work: Work, progress: Progress) -> list[CachedDocument]:
        """One shard's documents with their rows. `work` and `progress` are told of every window."""
        windows = [self.recipe.cutter.windows(document) for document in documents]
        scores = iter(self.engine.score([window for cut in windows for window in cut]))
        cached = []
        for document, cut in zip(documents, windows, strict=True):
            work.windows_cut += max(0, len(cut) - 1)
            of_document = []
            for window in cut:
                of_document.append(next(scores))
                work.tokens += len(window.ids)
                progress.tokens(len(window.ids))
            progress.document_done(document)
            cached.append(cached_document(document, cut, of_document, self.engine.config.k, self.recipe.settings.k_ids))
        return cached

"""Scoring and writing at the same time: the engine always has windows queued, and never waits for codec or disk.

Windows of all missing shards are one stream, cut while the engine asks for them, so that the next shard's are queued
before the last one's rows are back. Finished shards are encoded, checked and written by threads behind it; a shard is
committed when all its rows are there, as ever, so that an interruption costs the shards that are open.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

from cache_builder.engines.base import Engine, WindowScores
from cache_builder.progress import Progress, Work
from cache_builder.rows import Cutter, cached_document
from storage_specs.document import CachedDocument, Document
from storage_specs.windows import Window

Jobs = Sequence[tuple[int, Sequence[Document]]]
# One thread encodes about 40,000 rows a second at k = 64, a GPU may score more than 100,000.
WRITERS = 4
# Shards not written yet, those being written included; each holds its rows (about 200 MB for half a million, k = 64).
SHARDS_WAITING = 6


def score_shards(
    jobs: Jobs, engine: Engine, cutter: Cutter, k_ids: int, work: Work, progress: Progress
) -> Iterator[tuple[int, list[CachedDocument]]]:
    """(shard, its documents with their rows) for each job, in order. `work` and `progress` are told of every document.

    Raises what cutting and scoring raise.
    """
    k, edges = engine.config.k, engine.config.rank_edges
    bins = None if edges is None else len(edges) - 1
    scored = _score_documents((document for _, members in jobs for document in members), engine, cutter)
    for shard, members in jobs:
        cached = []
        for document, windows, scores in islice(scored, len(members)):
            tokens = sum(len(window.ids) for window in windows)
            work.windows_cut += max(0, len(windows) - 1)
            work.tokens += tokens
            progress.tokens(tokens)
            progress.document_done(document)
            cached.append(cached_document(document, windows, scores, k, k_ids, bins))
        progress.shard_scored()
        yield shard, cached


def _score_documents(
    documents: Iterator[Document], engine: Engine, cutter: Cutter
) -> Iterator[tuple[Document, list[Window], list[WindowScores]]]:
    """Every document with its windows and their scores, in order; documents without windows have none."""
    waiting: deque[tuple[Document, list[Window]]] = deque()

    def windows() -> Iterator[Window]:
        for document in documents:
            waiting.append((document, cutter.windows(document)))
            yield from waiting[-1][1]

    scores: list[WindowScores] = []
    for score in engine.score(windows()):
        while not waiting[0][1]:
            yield *waiting.popleft(), []
        scores.append(score)
        if len(scores) == len(waiting[0][1]):
            yield *waiting.popleft(), scores
            scores = []
    while waiting:
        yield *waiting.popleft(), []


class BackgroundWriter:
    """Writes shards in threads; `put` waits where SHARDS_WAITING of them are not written yet.

    write: `CacheWriter.write_shard`. done: called by the caller after each shard, in order. What `write` raises comes
    out of a later `put`, or of the `with` block's end. Left by an exception, it still writes what it was given.
    """

    def __init__(self, write: Callable[[int, list[CachedDocument]], Any], done: Callable[[], None]) -> None:
        self.write, self.done = write, done
        self.threads = ThreadPoolExecutor(max_workers=WRITERS, thread_name_prefix="shard-writer")
        self.waiting: deque[Future[Any]] = deque()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def put(self, shard: int, documents: list[CachedDocument]) -> None:
        while self.waiting and (self.waiting[0].done() or len(self.waiting) >= SHARDS_WAITING):
            self._finish()
        self.waiting.append(self.threads.submit(self.write, shard, documents))

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        try:
            while self.waiting and kind is None:
                self._finish()
        finally:
            self.threads.shutdown()

    def _finish(self) -> None:
        self.waiting.popleft().result()
        self.done()

"""Scoring and writing at the same time: the engine always has windows queued, and never waits for codec or disk.

Windows of all missing shards are one stream, cut while the engine asks for them, so that the next shard's are queued
before the last one's rows are back. Finished shards are encoded and written behind it by threads, which leave the
encoding to processes where a GPU is faster than they are (`encoders`); a shard is committed when all its rows are
there, as ever, so that an interruption costs the shards that are open.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cache_builder.progress import Progress, Work
from cache_builder.rows import Cutter, cached_document
from storage_specs.document import CachedDocument, Document

Job = tuple[int, Sequence[Document]]  # a shard's number and its documents
WRITERS = 4
COMMITTING = 2  # writers beyond the encoders' number, so that none of these waits for the disk
# Beside those being written; each holds its rows (about 200 MB for half a million, k = 64).
SHARDS_WAITING = 2


@dataclass(kw_only=True)
class OpenShard:
    """A shard whose requests are with the engine. finish: its documents, from the results of all its requests."""

    shard: int
    documents: Sequence[Document]
    requests: Sequence[Any]
    finish: Callable[[list[Any], Work], list[CachedDocument]]
    work: Work


class Feed:
    """The requests of one shard after the other, made when the engine asks for them.

    Where `jobs` has nothing for the moment, so has this; asked again later it may go on, like the jobs themselves.
    """

    def __init__(self, jobs: Iterator[Job], open_shard: Callable[[Job], OpenShard]) -> None:
        self.jobs, self.open_shard = jobs, open_shard
        self.opened: deque[OpenShard] = deque()
        self.requests: Iterator[Any] = iter(())

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> Any:
        while True:
            for request in self.requests:
                return request
            opened = self.open_shard(next(self.jobs))
            self.opened.append(opened)
            self.requests = iter(opened.requests)


def finished_shards(
    jobs: Iterable[Job],
    open_shard: Callable[[Job], OpenShard],
    ask: Callable[[Iterable[Any]], Iterator[Any]],
    progress: Progress,
) -> Iterator[tuple[OpenShard, list[CachedDocument]]]:
    """Every job's shard with its finished documents, in order. `ask`: an engine's `score` or `generate`.

    `progress` is told of every shard. Raises what opening and asking raise.
    """
    feed = Feed(iter(jobs), open_shard)
    results: list[Any] = []

    def ready() -> Iterator[tuple[OpenShard, list[CachedDocument]]]:
        while feed.opened and len(results) >= len(feed.opened[0].requests):
            opened = feed.opened.popleft()
            count = len(opened.requests)
            cached = opened.finish(results[:count], opened.work)
            del results[:count]
            progress.tokens(opened.work.tokens)
            for document in opened.documents:
                progress.document_done(document)
            progress.shard_scored()
            yield opened, cached

    for result in ask(feed):
        results.append(result)
        yield from ready()
    yield from ready()  # shards without any request


def windows_of_shard(job: Job, cutter: Cutter, k: int, k_ids: int, bins: int | None) -> OpenShard:
    """A shard to be scored. Raises TokenizerError, ChatTemplateError, ConfigError."""
    shard, documents = job
    cut = [cutter.windows(document) for document in documents]

    def finish(results: list[Any], work: Work) -> list[CachedDocument]:
        scores = iter(results)
        return [
            cached_document(document, windows, [next(scores) for _ in windows], k, k_ids, bins)
            for document, windows in zip(documents, cut, strict=True)
        ]

    work = Work(
        tokens=sum(len(window.ids) for windows in cut for window in windows),
        windows_cut=sum(max(0, len(windows) - 1) for windows in cut),
    )
    requests = [window for windows in cut for window in windows]
    return OpenShard(shard=shard, documents=documents, requests=requests, finish=finish, work=work)


class BackgroundWriter:
    """Writes shards in `writers` threads; `put` waits where SHARDS_WAITING more than these are not written yet.

    write: `CacheWriter.write_shard`. done: called by the caller after each shard, in order. What `write` raises comes
    out of a later `put`, or of the `with` block's end. Left by an exception, it still writes what it was given.
    """

    def __init__(
        self, write: Callable[[int, list[CachedDocument]], Any], done: Callable[[], None], writers: int = WRITERS
    ) -> None:
        self.write, self.done, self.most = write, done, writers + SHARDS_WAITING
        self.threads = ThreadPoolExecutor(max_workers=writers, thread_name_prefix="shard-writer")
        self.waiting: deque[Future[Any]] = deque()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def put(self, shard: int, documents: list[CachedDocument]) -> None:
        while self.waiting and (self.waiting[0].done() or len(self.waiting) >= self.most):
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

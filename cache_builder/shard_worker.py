"""One worker: scores shards of the plan and writes them, in whatever process and order it is given them.

A build in one process, its replicas and the actors of a Ray cluster all run this.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cache_builder.completions import completed
from cache_builder.engines import make_engine
from cache_builder.engines.base import Engine, EngineConfig
from cache_builder.engines.generating import Generator, Prompt, make_generator
from cache_builder.progress import Progress, Work
from cache_builder.prompts import prompt_ids, prompt_text, turns_of
from cache_builder.rows import Cutter, cached_document
from cache_builder.sampling import Sampling
from storage_specs.document import CachedDocument, Document
from storage_specs.errors import ConfigError
from storage_specs.generated import generation_record
from storage_specs.plan import Plan
from storage_specs.vocabulary import token_bytes
from storage_specs.writer import CacheSettings, CacheWriter

Job = tuple[int, Sequence[Document]]  # a shard's number and its documents


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a worker must know beside its shards' documents; may be pickled. output: the cache's folder.

    sampling: in mode generate, where the plan's documents are prompts; None where they are scored as they are.
    """

    output: Path
    settings: CacheSettings
    plan: Plan
    engine: str
    engine_config: EngineConfig
    cutter: Cutter
    sampling: Sampling | None = None

    def writer(self) -> CacheWriter:
        """Claims the folder, or finds the same plan there. Raises what `CacheWriter` raises."""
        return CacheWriter(self.output, self.settings, self.plan)


@dataclass(kw_only=True)
class OpenShard:
    """A shard whose windows or prompts are with the engine, and what has come back of it."""

    shard: int
    documents: Sequence[Document]
    requests: list[Any]
    finish: Callable[["OpenShard"], list[CachedDocument]]
    results: list[Any] = field(default_factory=list)
    work: Work = field(default_factory=Work)


class Feed:
    """The requests of one shard after the other, made when the engine asks for them.

    Where `jobs` has nothing for the moment, so has this; asked again later it may go on, like the jobs themselves.
    """

    def __init__(self, jobs: Iterator[Job], open_shard: Callable[[Job], OpenShard]) -> None:
        self.jobs, self.open_shard = jobs, open_shard
        self.opened: deque[OpenShard] = deque()
        self.asked: deque[Any] = deque()  # requests whose results have not come yet
        self.requests: Iterator[Any] = iter(())

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> Any:
        while True:
            for request in self.requests:
                self.asked.append(request)
                return request
            opened = self.open_shard(next(self.jobs))
            self.opened.append(opened)
            self.requests = iter(opened.requests)


class ShardWorker:
    """Its teacher is loaded with the first shard. `engine`, `writer`: those that the process already has."""

    def __init__(self, recipe: Recipe, engine: Engine | None = None, writer: CacheWriter | None = None) -> None:
        self.recipe = recipe
        self.engine = engine or make_engine(recipe.engine, recipe.engine_config)
        self.writer = writer or recipe.writer()

    def run(self, jobs: Iterable[Job], done: Callable[[int, Work], None], progress: Progress) -> None:
        """Score and write every job; `done(shard, work)` after each, once its record stands.

        Requests of later shards are with the engine before the first is finished, so that it never runs dry. Raises
        EngineError, TokenizerError, ChatTemplateError, StorageFullError, OutputFolderError.
        """
        generates = self.recipe.sampling is not None
        feed = Feed(iter(jobs), self._open_prompts if generates else self._open_windows)
        results = self.generator.generate(feed) if generates else self.engine.score(feed)
        waiting: deque[Any] = deque()

        def write_finished() -> None:
            while feed.opened and len(waiting) >= len(feed.opened[0].requests):
                opened = feed.opened.popleft()
                opened.results = [waiting.popleft() for _ in opened.requests]
                cached = opened.finish(opened)
                for document in opened.documents:
                    progress.document_done(document)
                self.writer.write_shard(opened.shard, cached)
                done(opened.shard, opened.work)

        for result in results:
            waiting.append(result)
            progress.tokens(len(feed.asked.popleft().ids))
            write_finished()
        write_finished()  # shards without any request

    def _open_windows(self, job: Job) -> OpenShard:
        shard, documents = job
        cut = [self.recipe.cutter.windows(document) for document in documents]

        def finish(opened: OpenShard) -> list[CachedDocument]:
            scores = iter(opened.results)
            return [
                cached_document(
                    document,
                    windows,
                    [next(scores) for _ in windows],
                    self.engine.config.k,
                    self.recipe.settings.k_ids,
                )
                for document, windows in zip(documents, cut, strict=True)
            ]

        work = Work(
            tokens=sum(len(window.ids) for windows in cut for window in windows),
            windows_cut=sum(max(0, len(windows) - 1) for windows in cut),
        )
        requests = [window for windows in cut for window in windows]
        return OpenShard(shard=shard, documents=documents, requests=requests, finish=finish, work=work)

    def _open_prompts(self, job: Job) -> OpenShard:
        shard, documents = job
        samples = [self.samples[number] for number in self.recipe.plan.shards[shard]]
        prompts = [self.prompt(document, sample) for document, sample in zip(documents, samples, strict=True)]

        def finish(opened: OpenShard) -> list[CachedDocument]:
            finished = [
                completed(document, generation, self.words, sample, self.recipe.settings.k_ids)
                for document, generation, sample in zip(documents, opened.results, samples, strict=True)
            ]
            opened.work.tokens += sum(len(generation.scores.gold_logprob) for generation in opened.results)
            opened.work.refused = generation_record(finished)["refused"]
            return finished

        work = Work(tokens=sum(len(prompt.ids) for prompt in prompts))
        return OpenShard(shard=shard, documents=documents, requests=prompts, finish=finish, work=work)

    @cached_property
    def words(self) -> list[bytes | None]:
        """The bytes of every id of the teacher's logits."""
        known = token_bytes(self.recipe.cutter.tokenizer)
        return known + [None] * (self.recipe.settings.vocab_size - len(known))

    @cached_property
    def generator(self) -> Generator:
        return make_generator(self.engine, self.recipe.sampling, self.words)

    def prompt(self, document: Document, sample: int) -> Prompt:
        """What an engine is asked for. Raises ConfigError where nothing can follow so long a prompt."""
        return make_prompt(self.recipe.cutter, document, self.recipe.sampling, sample, self.recipe.engine_config)

    @cached_property
    def samples(self) -> list[int]:
        """For every document of the plan: how often its prompt has come before."""
        seen: Counter[str] = Counter()
        numbers = []
        for doc_id in self.recipe.plan.doc_ids:
            numbers.append(seen[doc_id])
            seen[doc_id] += 1
        return numbers


def make_prompt(cutter: Cutter, document: Document, sampling: Sampling, sample: int, config: EngineConfig) -> Prompt:
    """A prompt document as a request. Raises ConfigError where it leaves no room, TokenizerError, ChatTemplateError."""
    text = prompt_text(cutter.tokenizer, document, cutter.chat_template, cutter.chat_template_kwargs)
    chat = document.kind == "chat"
    ids = prompt_ids(cutter.tokenizer, text, chat=chat, bos_token=cutter.bos_token)
    room = config.max_model_len - len(ids)
    if room < 1 or not len(ids):
        problem = f"leaves no room in {config.max_model_len} tokens: raise --max_model_len" if len(ids) else "is empty"
        raise ConfigError(f"prompt {document.doc_id[:12]} of {len(ids)} tokens {problem}, or leave it out")
    return Prompt(
        ids=ids,
        text=text,
        turns=turns_of(document) if chat else None,
        seed=sampling.seed_of(document.doc_id, sample),
        max_tokens=min(sampling.max_tokens, room),
    )

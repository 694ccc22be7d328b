"""One worker: scores shards of the plan and writes them, in whatever process and order it is given them.

A build in one process, its replicas and the actors of a Ray cluster all run this.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from cache_builder.completions import completed
from cache_builder.encoders import ShardEncoders, encoder_count
from cache_builder.engines import gpu_count, make_engine, make_generator
from cache_builder.engines.base import EngineConfig
from cache_builder.engines.generating import Generation, Generator, Prompt
from cache_builder.engines.interface import Engine
from cache_builder.pipeline import (
    COMMITTING,
    WRITERS,
    BackgroundWriter,
    Job,
    OpenShard,
    finished_shards,
    windows_of_shard,
)
from cache_builder.progress import Progress, Work
from cache_builder.prompts import prompt_ids, prompt_text, turns_of
from cache_builder.rows import Cutter
from cache_builder.sampling import Sampling
from cache_builder.self_check import check_engine, check_generator
from storage_specs.document import CachedDocument, Document
from storage_specs.errors import ConfigError
from storage_specs.generated import generation_record
from storage_specs.plan import Plan
from storage_specs.vocabulary import token_bytes
from storage_specs.writer import CacheSettings, CacheWriter


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a worker must know beside its shards' documents; may be pickled. output: the cache's folder.

    sampling: in mode generate, where the plan's documents are prompts; None where they are scored as they are.
    self_check: tokens of its first shard that a worker scores twice (`self_check.check_engine`), 0 for none; of several
    workers the first one does.
    replicas: workers that may share a machine. encoders: processes that encode a worker's rows, 0 where its own threads
    do; None: what the machine has cores for, where a GPU scores.
    """

    output: str | Path
    settings: CacheSettings
    plan: Plan
    engine: str
    engine_config: EngineConfig
    cutter: Cutter
    sampling: Sampling | None = None
    self_check: int = 0
    replicas: int = 1
    encoders: int | None = None

    def of_worker(self, number: int) -> "Recipe":
        """What one of several workers is told: they run the same teacher, so one of them checks it."""
        return self if number == 0 else replace(self, self_check=0)

    def writer(self) -> CacheWriter:
        """Of the place, which is free or holds the same plan. Raises what `CacheWriter` raises."""
        return CacheWriter(self.output, self.settings, self.plan)


class ShardWorker:
    """Its teacher is loaded with the first shard. `engine`, `writer`: those that the process already has."""

    def __init__(self, recipe: Recipe, engine: Engine | None = None, writer: CacheWriter | None = None) -> None:
        self.recipe = recipe
        self.engine = engine or make_engine(recipe.engine, recipe.engine_config)
        self._drift: tuple[dict[str, Any] | None] | None = None
        if writer is not None:
            self.writer = writer

    @cached_property
    def writer(self) -> CacheWriter:
        """Opened when it is first asked for: who only wants `finished` shards writes them otherwise."""
        return self.recipe.writer()

    def run(self, jobs: Iterable[Job], done: Callable[[int, Work], None], progress: Progress) -> None:
        """Score and write every job; `done(shard, work)` after each, in order, once its record stands.

        Raises EngineError, DriftError, TokenizerError, ChatTemplateError, StorageFullError, OutputFolderError.
        """
        written: deque[tuple[int, Work]] = deque()
        jobs = iter(jobs)
        first = next(jobs, None)
        if first is None:
            return
        encode = self.encoders  # started while the engine loads
        write = partial(self.writer.write_shard, drift=self.drift(first), encode=encode)
        writers = WRITERS if encode is None else encode.size + COMMITTING
        with BackgroundWriter(write, lambda: done(*written.popleft()), writers) as writing:
            for opened, cached in self.finished(chain([first], jobs), progress):
                written.append((opened.shard, opened.work))
                writing.put(opened.shard, cached)

    def close(self) -> None:
        """End the processes that encode."""
        encoders = self.__dict__.pop("encoders", None)
        if encoders is not None:
            encoders.close()

    @cached_property
    def encoders(self) -> ShardEncoders | None:
        """The processes that encode; None where the writer's threads do."""
        size = self.recipe.encoders
        if size is None:
            size = encoder_count(self.recipe.replicas) if self.recipe.engine == "vllm" and gpu_count() else 0
        return ShardEncoders(self.recipe.settings, size) if size else None

    def drift(self, first: Job) -> dict[str, Any] | None:
        """What the engine's rows of its first shard differ by from an independent forward pass; found out once.

        Raises DriftError, EngineError.
        """
        recipe = self.recipe
        if recipe.engine == "server" or not recipe.self_check:
            return None
        if self._drift is None and recipe.sampling is None:
            self._drift = (check_engine(self.engine, recipe.cutter, first[1], recipe.self_check),)
        elif self._drift is None:
            self._drift = (check_generator(self.engine, self.generator, self._prompts(first), recipe.self_check),)
        return self._drift[0]

    def finished(self, jobs: Iterable[Job], progress: Progress) -> Iterator[tuple[OpenShard, list[CachedDocument]]]:
        """Every job's documents with their rows, scored as they are, or answered where they are prompts; in order."""
        if self.recipe.sampling is not None:
            return finished_shards(jobs, self._prompts_of_shard, self.generator.generate, progress)
        edges = self.engine.config.rank_edges
        opening = partial(
            windows_of_shard,
            cutter=self.recipe.cutter,
            k=self.engine.config.k,
            k_ids=self.recipe.settings.k_ids,
            bins=None if edges is None else len(edges) - 1,
        )
        return finished_shards(jobs, opening, self.engine.score, progress)

    def _samples(self, shard: int) -> list[int]:
        return [self.samples[number] for number in self.recipe.plan.shards[shard]]

    def _prompts(self, job: Job) -> list[Prompt]:
        shard, documents = job
        return [self.prompt(document, sample) for document, sample in zip(documents, self._samples(shard), strict=True)]

    def _prompts_of_shard(self, job: Job) -> OpenShard:
        shard, documents = job
        samples, prompts = self._samples(shard), self._prompts(job)

        def finish(results: list[Generation], work: Work) -> list[CachedDocument]:
            finished = [
                completed(document, generation, self.words, sample, self.recipe.settings.k_ids)
                for document, generation, sample in zip(documents, results, samples, strict=True)
            ]
            work.tokens += sum(len(generation.scores.gold_logprob) for generation in results)
            work.refused = generation_record(finished)["refused"]
            most = self.recipe.sampling.max_tokens
            lengths = [len(item.scores.gold_logprob) for item in results if item.finish_reason == "length"]
            work.cut_short = sum(length < most for length in lengths)
            return finished

        work = Work(tokens=sum(len(prompt.ids) for prompt in prompts))
        return OpenShard(shard=shard, documents=documents, requests=prompts, finish=finish, work=work)

    @cached_property
    def words(self) -> list[bytes | None]:
        """The bytes of every id of the teacher's logits."""
        if self.recipe.cutter.tokenizer is None:  # behind an endpoint, which says itself what it wrote
            return []
        known = token_bytes(self.recipe.cutter.tokenizer)
        return known + [None] * (self.recipe.settings.vocab_size - len(known))

    @cached_property
    def generator(self) -> Generator:
        return make_generator(self.recipe.engine, self.engine, self.recipe.sampling, self.words)

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
    chat = document.kind == "chat"
    text = ""
    if not chat or cutter.tokenizer is not None:
        text = prompt_text(cutter.tokenizer, document, cutter.chat_template, cutter.chat_template_kwargs)
    turns = turns_of(document) if chat else None
    seed = sampling.seed_of(document.doc_id, sample)
    if cutter.tokenizer is None:  # an endpoint tokenises
        return Prompt(ids=np.zeros(0, np.int64), text=text, turns=turns, seed=seed, max_tokens=sampling.max_tokens)
    ids = prompt_ids(cutter.tokenizer, text, chat=chat, bos_token=cutter.bos_token)
    room = config.max_model_len - len(ids)
    if room < 1 or not len(ids):
        problem = f"leaves no room in {config.max_model_len} tokens: raise --max_model_len" if len(ids) else "is empty"
        raise ConfigError(f"prompt {document.doc_id[:12]} of {len(ids)} tokens {problem}, or leave it out")
    return Prompt(ids=ids, text=text, turns=turns, seed=seed, max_tokens=min(sampling.max_tokens, room))

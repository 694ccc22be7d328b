"""One worker: scores shards of the plan and writes them, in whatever process and order it is given them.

A build in one process, its replicas and the actors of a Ray cluster all run this.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cache_builder.completions import completed
from cache_builder.engines import make_engine
from cache_builder.engines.base import Engine, EngineConfig
from cache_builder.engines.generating import Prompt, make_generator
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


class ShardWorker:
    """Its teacher is loaded with the first shard. `engine`, `writer`: those that the process already has."""

    def __init__(self, recipe: Recipe, engine: Engine | None = None, writer: CacheWriter | None = None) -> None:
        self.recipe = recipe
        self.engine = engine or make_engine(recipe.engine, recipe.engine_config)
        self.writer = writer or recipe.writer()
        self.words: list[bytes | None] | None = None

    def run(self, jobs: Iterable[Job], done: Callable[[int, Work], None], progress: Progress) -> None:
        """Score and write every job; `done(shard, work)` after each, once its record stands.

        Raises EngineError, TokenizerError, ChatTemplateError, StorageFullError, OutputFolderError.
        """
        for shard, documents in jobs:
            work = Work()
            self.writer.write_shard(shard, self.cached(shard, documents, work, progress))
            done(shard, work)

    def cached(self, shard: int, documents: Sequence[Document], work: Work, progress: Progress) -> list[CachedDocument]:
        """One shard's documents with their rows, scored as they are, or answered where they are prompts."""
        do = self.score if self.recipe.sampling is None else self.generate
        return do(shard, documents, work, progress)

    def score(self, shard: int, documents: Sequence[Document], work: Work, progress: Progress) -> list[CachedDocument]:
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

    def generate(
        self, shard: int, documents: Sequence[Document], work: Work, progress: Progress
    ) -> list[CachedDocument]:
        """One shard's prompts with the teacher's completions and their rows."""
        sampling, settings = self.recipe.sampling, self.recipe.settings
        if self.words is None:
            self.words = token_bytes(self.recipe.cutter.tokenizer)
            self.words += [None] * (settings.vocab_size - len(self.words))
        generator = make_generator(self.engine, sampling, self.words)
        samples = [self.samples[number] for number in self.recipe.plan.shards[shard]]
        prompts = [self.prompt(document, sample) for document, sample in zip(documents, samples, strict=True)]
        finished = []
        for document, sample, prompt, generation in zip(
            documents, samples, prompts, generator.generate(prompts), strict=True
        ):
            tokens = len(prompt.ids) + len(generation.scores.gold_logprob)
            work.tokens += tokens
            progress.tokens(tokens)
            progress.document_done(document)
            finished.append(completed(document, generation, self.words, sample, settings.k_ids))
        work.refused += generation_record(finished)["refused"]
        return finished

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

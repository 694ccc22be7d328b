"""`build`: corpus -> plan -> for every missing shard: windows -> scores -> rows -> shard; then the manifest.

The plan is static and every shard is an idempotent job, so the same call resumes whatever an interruption left.
"""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cache_builder.corpus import read_corpus
from cache_builder.engines import choose_engine, make_engine
from cache_builder.engines.base import Engine, EngineConfig, check_window
from cache_builder.pipeline import BackgroundWriter, score_shards
from cache_builder.progress import Progress, Work
from cache_builder.rows import Cutter
from cache_builder.self_check import DEFAULT_TOKENS, check_engine
from cache_builder.teacher import Teacher, find_teacher
from storage_specs.codecs import PROFILES
from storage_specs.columns import RowShape
from storage_specs.document import KINDS, TOOL_ROLES, Document
from storage_specs.errors import ConfigError
from storage_specs.manifest import Manifest
from storage_specs.plan import make_plan
from storage_specs.settings import DEFAULT_PROFILE
from storage_specs.token_alphabet import backend_of
from storage_specs.vocabulary import Vocabulary, special_roles, token_bytes
from storage_specs.writer import CacheSettings, CacheWriter

DEFAULT_K_IDS = 16
LONGEST_DEFAULT_WINDOW = 4096  # keeps the logits of a window in memory (4 GB of float32 at 262,144 words)
STORES = ("zarr", "arrow")


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Everything that a build is told; the flags of `cache-builder build` by the same names.

    k_ids None: 16, or k where that is less. max_model_len None: the model's own, at most 4,096 tokens.
    window_overlap None: an eighth of max_model_len, in tokens. self_check: tokens of the first documents that are
    scored twice, by the engine and by an independent forward pass; 0 checks nothing. engine_arguments: for vLLM.
    """

    teacher: str
    corpus: str
    output: str | Path
    k: int = 64
    k_ids: int | None = None
    engine: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    tokenizer: str | None = None
    bos_token: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_model_len: int | None = None
    window_overlap: int | None = None
    store: str = "zarr"
    profile: str = DEFAULT_PROFILE
    documents_per_shard: int = 256
    kind: str = "auto"
    split: str = "train"
    subset: str | None = None
    max_documents: int | None = None
    min_bytes: int = 0
    score_roles: tuple[str, ...] = ("assistant",)
    self_check: int = DEFAULT_TOKENS
    engine_arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("k", "documents_per_shard", "max_documents", "max_model_len", "window_overlap"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, but must be at least 1")
        for name in ("min_bytes", "self_check"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must not be negative")
        if not 0 <= self.ids_kept <= self.k:
            raise ConfigError(f"k_ids is {self.k_ids}, but must be from 0 to k, which is {self.k}")
        if self.store not in STORES:
            raise ConfigError(f"store is {self.store!r}, but must be {' or '.join(STORES)}")
        if self.profile not in PROFILES:
            raise ConfigError(f"profile is {self.profile!r}, but must be {' or '.join(PROFILES)}")
        if not all(self.score_roles) or not self.score_roles or set(self.score_roles) & set(TOOL_ROLES):
            raise ConfigError(
                f"score_roles is {','.join(self.score_roles)!r}, but must name roles, and never a tool's: what a tool "
                "answered is not for a model to predict"
            )

    @property
    def ids_kept(self) -> int:
        """k_ids, resolved."""
        return min(DEFAULT_K_IDS, self.k) if self.k_ids is None else self.k_ids


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What one call did; a resumed build did only part of what the manifest counts."""

    manifest: Manifest
    shards_written: int
    work: Work
    seconds: float


def build(config: BuildConfig) -> BuildReport:
    """Build, resume or confirm the cache at `config.output`.

    The teacher's weights are loaded only if a shard is missing. Raises CorpusError, ConfigError, TokenizerError,
    ChatTemplateError, EngineError, CacheMismatchError, OutputFolderError, StorageFullError; finished shards are kept.
    """
    started = time.monotonic()
    documents = list(
        read_corpus(
            config.corpus,
            kind=config.kind,
            split=config.split,
            subset=config.subset,
            max_documents=config.max_documents,
            min_bytes=config.min_bytes,
            score_roles=config.score_roles,
        )
    )
    teacher = find_teacher(
        config.teacher,
        revision=config.revision,
        dtype=config.dtype,
        tokenizer=config.tokenizer,
        chat_template_file=config.chat_template,
        weightless=config.engine_arguments.get("load_format") == "dummy",
    )
    engine = _engine(config, teacher)
    cutter = _cutter(config, teacher, engine.config)
    _rehearse(cutter, documents, engine.config)
    settings = _settings(config, teacher, engine, cutter, has_chats=any(item.kind == "chat" for item in documents))
    plan = make_plan(documents, config.documents_per_shard)
    writer = CacheWriter(config.output, settings, plan)
    missing = writer.missing_shards()
    jobs = [(shard, [documents[number] for number in plan.shards[shard]]) for shard in missing]
    work = Work()
    characters = sum(len(document.text) for _, shard in jobs for document in shard)
    with closing(engine):
        drift = check_engine(engine, cutter, documents, config.self_check) if jobs else None
        write = partial(writer.write_shard, drift=drift)
        with (
            Progress(characters, len(plan.shards) - len(jobs), len(plan.shards)) as progress,
            BackgroundWriter(write, progress.shard_done) as writing,
        ):
            for shard, cached in score_shards(jobs, engine, cutter, config.ids_kept, work, progress):
                writing.put(shard, cached)
    return BuildReport(
        manifest=writer.finalize(), shards_written=len(missing), work=work, seconds=time.monotonic() - started
    )


def _engine(config: BuildConfig, teacher: Teacher) -> Engine:
    longest = config.max_model_len or min(teacher.max_positions or LONGEST_DEFAULT_WINDOW, LONGEST_DEFAULT_WINDOW)
    if teacher.max_positions and longest > teacher.max_positions:
        raise ConfigError(f"max_model_len is {longest}, but the teacher takes at most {teacher.max_positions} tokens")
    shape = RowShape(k=config.k, k_ids=config.ids_kept, vocab_size=teacher.vocab_size, profile=config.profile)
    return make_engine(
        choose_engine(config.engine),
        EngineConfig(
            model=str(teacher.folder),
            dtype=teacher.dtype,
            max_model_len=longest,
            k=config.k,
            vocab_size=teacher.vocab_size,
            rank_edges=shape.rank_edges,
            arguments=config.engine_arguments,
        ),
    )


def _cutter(config: BuildConfig, teacher: Teacher, engine_config: EngineConfig) -> Cutter:
    return Cutter(
        tokenizer=teacher.tokenizer,
        chat_template=teacher.chat_template,
        chat_template_kwargs=config.chat_template_kwargs,
        bos_token=config.bos_token,
        capacity=engine_config.capacity,
        overlap=config.window_overlap or max(1, engine_config.max_model_len // 8),
    )


def _rehearse(cutter: Cutter, documents: Sequence[Document], config: EngineConfig) -> None:
    """Cut the first document of each kind, so that what is wrong with a template, the windows or the tokenizer fails
    before the folder is claimed; every document where the tokenizer has words that the teacher's logits lack.

    Special tokens beyond the logits are common (Gemma's image tokens) and do not count: texts hardly ever hold them.
    """
    words = backend_of(cutter.tokenizer).get_vocab(with_added_tokens=False)
    suspect = max(words.values(), default=0) >= config.vocab_size
    first_of_kind = [next((item for item in documents if item.kind == kind), None) for kind in KINDS]
    for document in documents if suspect else filter(None, first_of_kind):
        for window in cutter.windows(document):
            check_window(window, config)


def _settings(
    config: BuildConfig, teacher: Teacher, engine: Engine, cutter: Cutter, *, has_chats: bool
) -> CacheSettings:
    vocabulary = _vocabulary(teacher) if config.ids_kept else None
    chats = teacher.chat_template_identity(config.chat_template_kwargs) | {"score_roles": sorted(config.score_roles)}
    return CacheSettings(
        teacher=teacher.identity(),
        tokenizer=teacher.tokenizer_identity() | {"bos_token": config.bos_token},
        chat_template=chats if has_chats else None,
        engine=engine.describe(),
        k=config.k,
        k_ids=config.ids_kept,
        vocab_size=teacher.vocab_size,
        store=config.store,
        profile=config.profile,
        windows={"max_model_len": engine.config.max_model_len, "overlap": cutter.overlap},
        vocabulary=vocabulary,
    )


def _vocabulary(teacher: Teacher) -> Vocabulary:
    """The words of the ids that the teacher's logits have; tokenizers may know fewer (padding) or more of them."""
    size = teacher.vocab_size
    known = token_bytes(teacher.tokenizer)[:size]
    roles = {token: role for token, role in special_roles(teacher.tokenizer).items() if token < size}
    return Vocabulary(token_bytes=known + [None] * (size - len(known)), special_roles=roles)

"""`build`: corpus -> plan -> for every missing shard: windows -> scores -> rows -> shard; then the manifest.

The plan is static and every shard is an idempotent job, so the same call resumes whatever an interruption left.
"""

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache_builder.dispatch import dispatch
from cache_builder.engines import choose_engine, make_engine
from cache_builder.engines.base import Engine, EngineConfig, check_window
from cache_builder.extension import extended, take_over_base
from cache_builder.progress import Progress, Work
from cache_builder.prompts import read_prompts
from cache_builder.ray_launcher import ray_actors
from cache_builder.replicas import replicas
from cache_builder.rows import Cutter
from cache_builder.sampling import Sampling
from cache_builder.self_check import DEFAULT_TOKENS
from cache_builder.shard_worker import Recipe, ShardWorker, make_prompt
from cache_builder.teacher import Teacher, endpoint_teacher, find_teacher
from storage_specs.codecs import PROFILES, sketch
from storage_specs.corpus import read_corpus
from storage_specs.document import KINDS, TOOL_ROLES, Document
from storage_specs.errors import ConfigError
from storage_specs.lease import lease
from storage_specs.manifest import Manifest
from storage_specs.merging import Source
from storage_specs.plan import Plan, make_plan
from storage_specs.settings import DEFAULT_PROFILE, CacheSettings
from storage_specs.sketch import log_rank_edges
from storage_specs.token_alphabet import backend_of
from storage_specs.vocabulary import Vocabulary, special_roles, token_bytes

DEFAULT_K, DEFAULT_K_IDS = 64, 16
LONGEST_DEFAULT_WINDOW = 4096  # keeps the logits of a window in memory (4 GB of float32 at 262,144 words)
STORES = ("zarr", "arrow")
MODES = ("score", "generate")
ENDPOINT = ("base_url", "api_key_env", "max_concurrency", "timeout", "vocab_size")
SAMPLING = ("temperature", "top_p", "top_k", "n", "stop", "seed", "max_tokens")
LAUNCHERS = ("local", "ray")


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Everything that a build is told; the flags of `cache-builder build` by the same names.

    k None: 64, or 16 in the profile sketch, which keeps the rest as tail_bins masses (None: 20). k_ids None: 16, or k
    where that is less. max_model_len None: the model's own, at most 4,096 tokens.
    window_overlap None: an eighth of max_model_len, in tokens. shard_range: first and last + 1, None for no end.
    extend: a cache whose shards the new one takes over; documents that it holds are not scored again. no_text: keep of
    documents only ids and byte ranges; whoever reads the cache must have the corpus.
    mode, temperature to max_tokens: see `Sampling`, which has the defaults; for mode generate only. base_url to
    vocab_size: see `ServerEngine` and `endpoint_teacher`; for engine server only. launcher: where the
    data_parallel_size replicas run, on this machine (local) or as actors of a Ray cluster (ray). self_check: tokens
    that each worker first compares with an independent forward pass, 0 for none. engine_arguments: passed to vLLM.
    """

    teacher: str
    corpus: str
    output: str | Path
    k: int | None = None
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
    tail_bins: int | None = None
    documents_per_shard: int = 256
    kind: str = "auto"
    split: str = "train"
    subset: str | None = None
    max_documents: int | None = None
    min_bytes: int = 0
    score_roles: tuple[str, ...] = ("assistant",)
    shard_range: tuple[int, int | None] | None = None
    extend: str | None = None
    no_text: bool = False
    mode: str = "score"
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    n: int | None = None
    stop: Sequence[str] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    base_url: str | None = None
    api_key_env: str | None = None
    max_concurrency: int | None = None
    timeout: float | None = None
    vocab_size: int | None = None
    launcher: str = "local"
    data_parallel_size: int = 1
    self_check: int = DEFAULT_TOKENS
    engine_arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.k is None:
            object.__setattr__(self, "k", sketch.HEAD if self.profile == sketch.SketchCodec.profile else DEFAULT_K)
        for name in (
            "k",
            "documents_per_shard",
            "max_documents",
            "max_model_len",
            "window_overlap",
            "data_parallel_size",
            "tail_bins",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, but must be at least 1")
        if self.min_bytes < 0:
            raise ConfigError(f"min_bytes is {self.min_bytes}, but must not be negative")
        if not 0 <= self.ids_kept <= self.k:
            raise ConfigError(f"k_ids is {self.k_ids}, but must be from 0 to k, which is {self.k}")
        if self.store not in STORES:
            raise ConfigError(f"store is {self.store!r}, but must be {' or '.join(STORES)}")
        if self.profile not in PROFILES:
            raise ConfigError(f"profile is {self.profile!r}, but must be {' or '.join(PROFILES)}")
        if self.tail_bins is not None and self.profile != sketch.SketchCodec.profile:
            raise ConfigError(f"tail_bins are kept by the profile sketch only, and profile is {self.profile!r}")
        if self.shard_range and not 0 <= self.shard_range[0] < (self.shard_range[1] or math.inf):
            raise ConfigError(f"shard_range is {self.shard_range}, but must be A:B with 0 <= A < B")
        if self.mode not in MODES:
            raise ConfigError(f"mode is {self.mode!r}, but must be {' or '.join(MODES)}")
        if self.mode == "generate":
            self.sampling(())
            for name, default in (("kind", "auto"), ("min_bytes", 0), ("window_overlap", None)):
                if getattr(self, name) != default:
                    raise ConfigError(f"{name} is for texts that are scored; leave it out in mode generate")
        elif given := [name for name in SAMPLING if getattr(self, name) is not None]:
            raise ConfigError(f"{', '.join(given)}: for completions that the teacher writes; add --mode generate")
        self._check_endpoint()
        if self.launcher not in LAUNCHERS:
            raise ConfigError(f"launcher is {self.launcher!r}, but must be {' or '.join(LAUNCHERS)}")
        if not all(self.score_roles) or not self.score_roles or set(self.score_roles) & set(TOOL_ROLES):
            raise ConfigError(
                f"score_roles is {','.join(self.score_roles)!r}, but must name roles, and never a tool's: what a tool "
                "answered is not for a model to predict"
            )

    @property
    def ids_kept(self) -> int:
        """k_ids, resolved."""
        if self.k_ids is None and self.engine == "server" and self.mode == "generate":
            return 0
        return min(DEFAULT_K_IDS, self.k) if self.k_ids is None else self.k_ids

    def _check_endpoint(self) -> None:
        if self.engine != "server":
            given = [name for name in ENDPOINT if getattr(self, name) is not None]
            if given:
                raise ConfigError(f"{', '.join(given)}: for teachers behind an endpoint; add --engine server")
            return
        if self.base_url is None:
            raise ConfigError("engine server needs --base_url, such as http://localhost:8000/v1")
        if self.engine_arguments:
            raise ConfigError(f"{', '.join(self.engine_arguments)}: an argument of vLLM; give it to the server itself")
        for name in ("max_concurrency", "timeout", "vocab_size"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}, but must be above 0")

    def rank_edges(self, vocab_size: int) -> tuple[int, ...] | None:
        """The ranks between which the sorted tail's masses are kept; None but in the profile sketch. ConfigError."""
        if self.profile != sketch.SketchCodec.profile:
            return None
        return tuple(log_rank_edges(self.k, vocab_size, self.tail_bins or sketch.BINS).tolist())

    def sampling(self, stop_token_ids: tuple[int, ...]) -> Sampling | None:
        """How completions are written; None in mode score. Raises ConfigError."""
        if self.mode == "score":
            return None
        given = {name: getattr(self, name) for name in SAMPLING if getattr(self, name) is not None}
        return Sampling(**given | {"stop": tuple(self.stop or ())}, stop_token_ids=stop_token_ids)

    @property
    def gpus_per_replica(self) -> int:
        """What vLLM's own parallelism takes."""
        sizes = (self.engine_arguments.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))
        try:
            return math.prod(map(int, sizes))
        except ValueError as error:
            raise ConfigError(
                f"tensor_parallel_size and pipeline_parallel_size must be whole numbers: {error}"
            ) from None

    def shards_of(self, plan: Plan) -> range:
        """The shards that this call is to build: all, or those of shard_range that the plan has."""
        return range(len(plan.shards))[slice(*self.shard_range or (0, None))]


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Everything that is known before the teacher's weights are loaded.

    documents: those to be scored, the last ones of the plan. engine: not loaded yet. base: the cache whose documents
    the plan lists before them, where the build extends one.
    """

    documents: Sequence[Document]
    engine: Engine
    recipe: Recipe
    base: Source | None = None

    @property
    def plan(self) -> Plan:
        return self.recipe.plan

    def members(self, shard: int) -> list[Document]:
        """The documents of one shard."""
        before = len(self.plan.doc_ids) - len(self.documents)
        return [self.documents[number - before] for number in self.plan.shards[shard]]

    def characters(self, shards: Iterable[int]) -> int:
        """The length of these shards' texts, from which a bar estimates its end."""
        return sum(len(document.text) for shard in shards for document in self.members(shard))


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
    Raises CorpusError, ConfigError, TokenizerError, ChatTemplateError, EngineError, CacheMismatchError,
    CacheInUseError, OutputFolderError, StorageFullError; finished shards are kept.
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
                ShardWorker(prepared.recipe, prepared.engine, writer).run(jobs, done, progress)
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


def prepare(config: BuildConfig) -> Preparation:
    """Read the corpus, find the teacher and make the plan. Nothing is written, no weights are loaded."""
    documents = _documents(config)
    teacher = _teacher(config)
    name = choose_engine(config.engine)
    engine = make_engine(name, _engine_config(config, teacher))
    cutter = _cutter(config, teacher, engine.config)
    sampling = config.sampling(teacher.end_ids())
    if sampling is None:
        _rehearse(cutter, documents, engine.config)
    else:
        for document in documents[:: sampling.n]:
            make_prompt(cutter, document, sampling, 0, engine.config)
    recipe = Recipe(
        output=config.output,
        settings=_settings(
            config, teacher, engine, cutter, sampling, has_chats=any(item.kind == "chat" for item in documents)
        ),
        plan=make_plan(documents, config.documents_per_shard),
        engine=name,
        engine_config=engine.config,
        cutter=cutter,
        sampling=sampling,
        self_check=config.self_check,
    )
    prepared = Preparation(documents=documents, engine=engine, recipe=recipe)
    return prepared if config.extend is None else extended(prepared, config.extend, config.documents_per_shard)


def _documents(config: BuildConfig) -> list[Document]:
    """What the plan lists: the corpus, or its prompts, each as often as it is answered."""
    if config.mode == "generate":
        prompts = read_prompts(
            config.corpus, split=config.split, subset=config.subset, max_documents=config.max_documents
        )
        return [prompt for prompt in prompts for _ in range(config.n or 1)]
    return list(
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


def _teacher(config: BuildConfig) -> Teacher:
    if config.engine == "server":
        return endpoint_teacher(
            config.teacher,
            revision=config.revision,
            tokenizer=config.tokenizer,
            chat_template_file=config.chat_template,
            vocab_size=config.vocab_size,
            needs_tokenizer=config.mode == "score" or config.ids_kept > 0,
        )
    return find_teacher(
        config.teacher,
        revision=config.revision,
        dtype=config.dtype,
        tokenizer=config.tokenizer,
        chat_template_file=config.chat_template,
        weightless=config.engine_arguments.get("load_format") == "dummy",
    )


def _engine_config(config: BuildConfig, teacher: Teacher) -> EngineConfig:
    longest = config.max_model_len or min(teacher.max_positions or LONGEST_DEFAULT_WINDOW, LONGEST_DEFAULT_WINDOW)
    if teacher.max_positions and longest > teacher.max_positions:
        raise ConfigError(f"max_model_len is {longest}, but the teacher takes at most {teacher.max_positions} tokens")
    arguments = config.engine_arguments
    if config.engine == "server":
        names = ("base_url", "api_key_env", "max_concurrency", "timeout")
        arguments = {name: getattr(config, name) for name in names} | {"returns_ids": config.ids_kept > 0}
    return EngineConfig(
        model=config.teacher if config.engine == "server" else str(teacher.folder),
        dtype=teacher.dtype,
        max_model_len=longest,
        k=config.k,
        vocab_size=teacher.vocab_size,
        rank_edges=config.rank_edges(teacher.vocab_size),
        arguments=arguments,
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
    config: BuildConfig,
    teacher: Teacher,
    engine: Engine,
    cutter: Cutter,
    sampling: Sampling | None,
    *,
    has_chats: bool,
) -> CacheSettings:
    vocabulary = _vocabulary(teacher) if config.ids_kept else None
    chats = teacher.chat_template_identity(config.chat_template_kwargs)
    if sampling is None:
        chats["score_roles"] = sorted(config.score_roles)
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
        text=not config.no_text,
        parameters={} if engine.config.rank_edges is None else {"rank_edges": list(engine.config.rank_edges)},
        windows={
            "max_model_len": engine.config.max_model_len,
            "overlap": cutter.overlap if sampling is None else 0,
        },
        vocabulary=vocabulary,
        generation=None if sampling is None else sampling.to_json(),
    )


def _vocabulary(teacher: Teacher) -> Vocabulary:
    """The words of the ids that the teacher's logits have; tokenizers may know fewer (padding) or more of them."""
    size = teacher.vocab_size
    known = token_bytes(teacher.tokenizer)[:size]
    roles = {token: role for token, role in special_roles(teacher.tokenizer).items() if token < size}
    return Vocabulary(token_bytes=known + [None] * (size - len(known)), special_roles=roles)

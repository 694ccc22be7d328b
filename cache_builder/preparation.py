"""What a build decides before the teacher's weights are loaded: documents, teacher, engine, plan, settings."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cache_builder.build_config import BuildConfig
from cache_builder.engines import choose_engine, make_engine
from cache_builder.engines.base import EngineConfig, check_window
from cache_builder.engines.interface import Engine
from cache_builder.extension import extended
from cache_builder.prompts import read_prompts
from cache_builder.rows import Cutter
from cache_builder.sampling import Sampling
from cache_builder.shard_worker import Recipe, make_prompt
from cache_builder.teacher import Teacher, endpoint_teacher, find_teacher
from storage_specs.corpus import read_corpus
from storage_specs.document import KINDS, Document
from storage_specs.errors import ConfigError
from storage_specs.merging import Source
from storage_specs.plan import Plan, make_plan
from storage_specs.settings import CacheSettings
from storage_specs.token_alphabet import backend_of
from storage_specs.vocabulary import Vocabulary, special_roles, token_bytes

LONGEST_DEFAULT_WINDOW = 4096  # keeps the logits of a window in memory (4 GB of float32 at 262,144 words)


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
        prompts = (make_prompt(cutter, document, sampling, 0, engine.config) for document in documents[:: sampling.n])
        sizes = [len(prompt.ids) for prompt in prompts]
        if cutter.tokenizer is not None:
            _check_room(sizes, sampling.max_tokens, engine.config.max_model_len)
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
        replicas=config.data_parallel_size,
    )
    base = None
    if config.extend is not None:
        recipe, documents, base = extended(recipe, documents, config.extend, config.documents_per_shard)
    return Preparation(documents=documents, engine=engine, recipe=recipe, base=base)


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


def _check_room(sizes: Sequence[int], max_tokens: int, max_model_len: int) -> None:
    """Says on stderr how many prompts, of so many tokens, leave less room than `max_tokens`: their completions may be
    cut. Raises ConfigError where no prompt could leave as much."""
    if max_tokens >= max_model_len:
        raise ConfigError(
            f"max_tokens is {max_tokens}, but a prompt and its completion have {max_model_len} tokens together "
            "(max_model_len): lower --max_tokens, or raise --max_model_len"
        )
    short = sum(size + max_tokens > max_model_len for size in sizes)
    if short:
        longest = max(sizes)
        print(
            f"max_tokens {max_tokens}: {short:,} of {len(sizes):,} prompts leave less room in max_model_len "
            f"{max_model_len} (the longest, of {longest} tokens, leaves {max_model_len - longest}), where their "
            f"completions may be cut; --max_model_len {longest + max_tokens} would have room for all",
            file=sys.stderr,
        )


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

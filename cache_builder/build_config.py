"""What a build is told: every flag of `cache-builder build` and `plan`, checked before anything is read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache_builder.sampling import Sampling
from cache_builder.self_check import DEFAULT_TOKENS
from storage_specs.codecs import BINS, PROFILES, SketchCodec, default_k, default_parameters
from storage_specs.document import TOOL_ROLES
from storage_specs.errors import ConfigError
from storage_specs.plan import Plan
from storage_specs.settings import DEFAULT_PROFILE

DEFAULT_K_IDS = 16
STORES = ("zarr", "arrow")
MODES = ("score", "generate")
ENDPOINT = ("base_url", "api_key_env", "max_concurrency", "timeout", "vocab_size")
SAMPLING = ("temperature", "top_p", "top_k", "n", "stop", "seed", "max_tokens")
LAUNCHERS = ("local", "ray")
LONGEST_TIMEOUT = 86_400  # seconds; a socket's clock overflows far above


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
    split: str | None = None
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
            object.__setattr__(self, "k", default_k(self.profile))
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
        for name in ("teacher", "corpus", "output"):
            if not str(getattr(self, name)):
                raise ConfigError(f"{name} is empty")
        if self.self_check != 0 and self.self_check < 2:
            raise ConfigError(f"self_check is {self.self_check}, but must be 0 (none) or at least 2 tokens")
        if self.min_bytes < 0:
            raise ConfigError(f"min_bytes is {self.min_bytes}, but must not be negative")
        if not 0 <= self.ids_kept <= self.k:
            raise ConfigError(f"k_ids is {self.k_ids}, but must be from 0 to k, which is {self.k}")
        if self.store not in STORES:
            raise ConfigError(f"store is {self.store!r}, but must be {' or '.join(STORES)}")
        if self.profile not in PROFILES:
            raise ConfigError(f"profile is {self.profile!r}, but must be {' or '.join(PROFILES)}")
        if self.tail_bins is not None and self.profile != SketchCodec.profile:
            raise ConfigError(f"tail_bins are kept by the profile sketch only, and profile is {self.profile!r}")
        first, last = self.shard_range or (0, None)
        if not 0 <= first < (math.inf if last is None else last):
            raise ConfigError(f"shard_range is {self.shard_range}, but must be A:B with 0 <= A < B")
        if self.mode not in MODES:
            raise ConfigError(f"mode is {self.mode!r}, but must be {' or '.join(MODES)}")
        if self.mode == "generate":
            self.sampling(())
            for name in ("kind", "min_bytes", "score_roles", "window_overlap"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ConfigError(f"{name} is for texts that are scored; leave it out in mode generate")
        elif given := [name for name in SAMPLING if getattr(self, name) is not None]:
            raise ConfigError(f"{', '.join(given)}: for completions that the teacher writes; add --mode generate")
        self._check_endpoint()
        if self.gpus_per_replica < 1:
            raise ConfigError("tensor_parallel_size and pipeline_parallel_size must be at least 1")
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
        if self.profile == SketchCodec.profile:
            raise ConfigError(
                "the profile sketch needs all logits, and an endpoint gives the top k: choose another one"
            )
        for name in ("max_concurrency", "timeout", "vocab_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}, but must be above 0 and finite")
        if (self.timeout or 0) > LONGEST_TIMEOUT:
            raise ConfigError(f"timeout is {self.timeout}, but must be at most {LONGEST_TIMEOUT} seconds")

    def rank_edges(self, vocab_size: int) -> tuple[int, ...] | None:
        """The ranks between which the sorted tail's masses are kept; None but in the profile sketch. ConfigError."""
        parameters = default_parameters(self.profile, k=self.k, vocab_size=vocab_size, bins=self.tail_bins or BINS)
        return tuple(parameters["rank_edges"]) if parameters else None

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
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"tensor_parallel_size and pipeline_parallel_size must be whole numbers: {error}"
            ) from None

    def shards_of(self, plan: Plan) -> range:
        """The shards that this call is to build: all, or those of shard_range that the plan has."""
        return range(len(plan.shards))[slice(*self.shard_range or (0, None))]

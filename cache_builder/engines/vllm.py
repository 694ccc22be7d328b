"""The vLLM engine (vllm >= 0.26): rows of token-id prompts, reduced in the worker and handed over as arrays.

What is private in that is `vllm_capture`'s; where it does not fit the installed vLLM, rows come from the public
`prompt_logprobs` with `flat_logprobs` (flat lists instead of one dict per token), which cannot feed a sketch. Requests
are streamed: a bounded number of tokens is always queued, whatever the shards hold.

Legend: R rows of one window, K top-k ranks, J tail bins, L tokens of one window.
"""

import os
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, NoReturn

import numpy as np

from cache_builder.engines.base import EngineConfig, WindowScores, check_window, ordered_scores, window_scores
from cache_builder.engines.vllm_capture import EXTENSION, keep_arrays, version_problem
from cache_builder.engines.vllm_failures import failure
from storage_specs.errors import ConfigError, EngineError
from storage_specs.windows import Window

MINIMUM_VERSION = (0, 26)
TOKENS_IN_FLIGHT = 65_536  # eight steps of 8,192: enough to never starve vLLM; half a gigabyte as flat lists at k = 64
# Decided by the builder: the teacher itself, and what prompt log-probabilities need to be complete and untouched.
RESERVED = {
    "model": "--teacher",
    "tokenizer": "--tokenizer",
    "revision": "--revision",
    "dtype": "--dtype",
    "max_model_len": "--max_model_len",
    "max_logprobs": "--k",
    "logprobs_mode": "raw_logprobs, the model's own distribution",
    "enable_prefix_caching": "off, because reused prefixes return no log-probabilities",
    **dict.fromkeys(
        ("speculative_config", "spec_method", "spec_model", "spec_tokens"),
        "none, because speculation corrupts prompt log-probabilities",
    ),
    "kv_sharing_fast_prefill": "off, because it computes wrong prompt log-probabilities",
    "hf_token": "the environment variable HF_TOKEN, because arguments are kept in the manifest",
    "skip_tokenizer_init": "on, because prompts are token ids",
    "runner": "generate",
    "worker_extension_cls": "the capture in the worker",
    "enable_batch_sharded_sampling": "off, because one rank keeps the rows of all requests",
    "data_parallel_size": "1, because one process drives one replica",
}
# They place and schedule the work but do not choose the model's arithmetic: a build may resume with others.
RESOURCES = {
    "disable_log_stats",
    "distributed_executor_backend",
    "download_dir",
    "enforce_eager",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_num_batched_tokens",
    "max_num_seqs",
    "pipeline_parallel_size",
    "tensor_parallel_size",
}


def engine_argument_names() -> list[str]:
    """Names that may be passed through to vLLM; none where it is not installed. Imports vLLM."""
    if find_spec("vllm") is None:
        return []
    _vllm()
    from dataclasses import fields

    from vllm import EngineArgs

    return [item.name for item in fields(EngineArgs)]


class VllmEngine:
    """Scores windows with `vllm.LLM`; rows are reduced in the worker where its hooks fit this vLLM, else read flat."""

    def __init__(self, config: EngineConfig) -> None:
        for name in config.arguments:
            if name in RESERVED:
                raise ConfigError(f"{name} is not passed to vLLM: it is decided by the builder ({RESERVED[name]})")
        self.config = config
        self.version = _vllm().__version__
        stages = str(config.arguments.get("pipeline_parallel_size", 1))
        if stages != "1" and is_cpu_build():
            raise ConfigError(
                f"pipeline_parallel_size is {stages}, but vLLM's CPU build starts with 1 only (0.32 hangs or fails): "
                "use tensor_parallel_size or data_parallel_size"
            )
        self.arguments = _defaults(config) | _typed(config.arguments)
        # float32 logits (a GEMM of 16-bit weights that keeps its float32 sums): rounded ones tie at the last rank
        overrides = self.arguments.get("hf_overrides") or {}
        if not isinstance(overrides, dict):
            raise ConfigError(f"hf_overrides is {overrides!r:.100}, but must be a JSON object")
        self.arguments["hf_overrides"] = {"head_dtype": "float32"} | overrides
        self.flat_reason = version_problem(self.version)
        self._llm: Any = None
        self._captures = False
        self._requests = 0

    def describe(self) -> dict[str, Any]:
        from vllm.platforms import current_platform

        values = {name: value for name, value in self.config.arguments.items() if name not in RESOURCES}
        return {
            "name": "vllm",
            "version": self.version,
            "device": current_platform.device_type,
            "dtype": self.config.dtype,
            "head_dtype": self.arguments["hf_overrides"]["head_dtype"],
            "attention_backend": str(values.pop("attention_backend", "auto")),
            "arguments": {name: value if isinstance(value, bool) else str(value) for name, value in values.items()},
        }

    def score(self, windows: Iterable[Window]) -> Iterator[WindowScores]:
        self.load()
        if self.flat_reason is None and not self._captures:
            self.start_capture()
        if self.flat_reason is None:
            return self.stream(windows, captured_scores, self.parameters())
        if self.config.rank_edges is not None:
            raise EngineError(
                "the sketch needs all logits, and vLLM's public prompt_logprobs have the top k only: "
                f"{self.flat_reason}; choose another codec profile, or --engine transformers"
            )
        print(f"vllm {self.version}: rows through flat prompt_logprobs, slower: {self.flat_reason}", file=sys.stderr)
        return self.score_flat(windows)

    def score_flat(self, windows: Iterable[Window]) -> Iterator[WindowScores]:
        """`score` through vLLM's public `prompt_logprobs` alone: slower, without tail bins, independent of hooks."""
        self.stop_capture()
        yield from self.stream(windows, parse_flat, self.parameters())

    def close(self) -> None:
        """Stop vLLM's processes and free what they hold."""
        if self._llm is not None:
            llm, self._llm = self._llm, None
            llm.llm_engine.engine_core.shutdown()

    @property
    def is_loaded(self) -> bool:
        return self._llm is not None

    def parameters(self, **changed: Any) -> Any:
        """What every request asks of vLLM, as its `SamplingParams`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        asked = {"max_tokens": 1, "temperature": 0, "detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
        return SamplingParams(**asked | {"prompt_logprobs": self.config.k, "flat_logprobs": True} | changed)

    def stream(
        self, windows: Iterable[Window], read: Callable[[Any, Window, EngineConfig], Any], parameters: Any
    ) -> Iterator[Any]:
        """`read(prompt_logprobs, window, config)` of every window, in order.

        TOKENS_IN_FLIGHT tokens are queued in vLLM, so that its next step never waits for its client.
        """
        engine = self.load().llm_engine
        source = iter(windows)
        waiting: OrderedDict[str, Window] = OrderedDict()
        done: dict[str, Any] = {}
        tokens = 0
        try:
            while True:
                while tokens < TOKENS_IN_FLIGHT and (window := next(source, None)) is not None:
                    check_window(window, self.config)
                    name = f"window-{self._requests}"
                    self._requests += 1
                    waiting[name] = window
                    tokens += len(window.ids)
                    self.ask(engine.add_request, name, {"prompt_token_ids": window.ids.tolist()}, parameters)
                if not waiting:
                    return
                for output in self.ask(engine.step):
                    if output.finished:
                        done[output.request_id] = read(output.prompt_logprobs, waiting[output.request_id], self.config)
                while waiting and (name := next(iter(waiting))) in done:
                    tokens -= len(waiting.pop(name).ids)
                    yield done.pop(name)
        finally:
            unfinished = [name for name in waiting if name not in done]
            if unfinished and self._llm is not None:
                with suppress(Exception):  # the engine may be what failed
                    engine.abort_request(unfinished)

    def load(self) -> Any:
        """The `vllm.LLM`, loaded by the first call. Raises EngineError, DeviceMemoryError."""
        if self._llm is None:
            os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
            # A fork of a process that has asked for its GPUs cannot use them, nor can one inherit our threads.
            os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
            from vllm import LLM

            try:
                self._llm = LLM(
                    model=self.config.model,
                    dtype=self.config.dtype,
                    max_model_len=self.config.max_model_len,
                    max_logprobs=self.config.k,
                    logprobs_mode="raw_logprobs",
                    enable_prefix_caching=False,
                    skip_tokenizer_init=True,
                    worker_extension_cls=EXTENSION,
                    **_off("enable_batch_sharded_sampling"),
                    **self.arguments,
                )
            except Exception as error:  # pydantic, CUDA, memory: all of them mean that the engine did not start
                raise failure(f"teacher {self.config.model}: vLLM cannot load it", error, self.arguments) from error
            if self.flat_reason is None:
                try:
                    self.start_capture()
                except Exception:
                    self.close()
                    raise
        return self._llm

    def ask(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """What vLLM answers. Raises EngineError, DeviceMemoryError."""
        try:
            return method(*arguments)
        except Exception as error:  # the engine's process died, ran out of memory, or refused the request
            raise failure(f"teacher {self.config.model}: vLLM failed", error, self.arguments) from error

    def start_capture(self) -> None:
        """Hook the worker for `config`'s k and rank edges; `flat_reason` says why not, where they do not fit this vLLM.

        Raises EngineError, DeviceMemoryError: a block of logits is computed, the largest that a step may need.
        """
        edges = None if self.config.rank_edges is None else list(self.config.rank_edges)
        try:
            keep_arrays()
            answers = self._llm.collective_rpc("capture_start", args=(self.config.k, edges, self.config.vocab_size))
        except (ImportError, AttributeError, TypeError) as error:
            answers = [f"this vLLM's client is laid out differently ({error})"]
        except Exception as error:  # one block of logits is computed there
            raise failure(f"teacher {self.config.model}: vLLM cannot score", error, self.arguments) from error
        self.flat_reason = next(filter(None, answers), None)
        self._captures = self.flat_reason is None
        if not self._captures:
            self.stop_capture()

    def stop_capture(self) -> None:
        """From here on prompt log-probabilities are vLLM's own."""
        self.load().collective_rpc("capture_stop")
        self._captures = False


def _defaults(config: EngineConfig) -> dict[str, Any]:
    """What suits prefill on a GPU: steps that fill it, and room for blocks of logits beside the key-value cache."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike():
        return {}
    return {"max_num_batched_tokens": max(8192, config.max_model_len), "gpu_memory_utilization": 0.85}


def is_cpu_build() -> bool:
    """Whether the installed vLLM is one for CPUs."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def _off(*names: str) -> dict[str, bool]:
    """Those of the engine arguments that this vLLM has, switched off."""
    from vllm import EngineArgs

    return dict.fromkeys(set(names) & EngineArgs.__dataclass_fields__.keys(), False)


def captured_scores(rows: Any, window: Window, config: EngineConfig) -> WindowScores:
    """The rows of one window from what the worker captured: values (L-1, 1 + K + J) and ids (L-1, K)."""
    values_LW, ids_LK = rows if isinstance(rows, tuple) else (np.zeros((0, 0)), np.zeros((0, 0)))
    k, bins = config.k, config.bins
    expected = len(window.ids) - 1
    if values_LW.shape != (expected, 1 + k + bins) or ids_LK.shape != (expected, k):
        raise EngineError(
            f"vLLM returned rows of shapes {values_LW.shape} and {ids_LK.shape} for {len(window.ids)} tokens, expected "
            f"{expected} rows of {1 + k + bins} values and {k} ids: the capture in the worker does not fit this vLLM"
        )
    values_RW = values_LW[window.logits_index]
    return ordered_scores(
        values_RW[:, 0], values_RW[:, 1 : 1 + k], ids_LK[window.logits_index], values_RW[:, 1 + k :] if bins else None
    )


def parse_flat(flat: Any, window: Window, config: EngineConfig) -> WindowScores:
    """The rows of one window from vLLM's `FlatLogprobs`.

    Position 0 has no entries; each later position has K + 1, not de-duplicated: the prompt's own token first, then the
    K best. Position i + 1 belongs to the logits of position i. Raises EngineError for any other shape.
    """
    length, width = len(window.ids), config.k + 1
    starts_L = np.asarray(flat.start_indices)
    token_ids, logprobs = np.asarray(flat.token_ids, dtype=np.int64), np.asarray(flat.logprobs, dtype=np.float32)
    expected_L = np.maximum(np.arange(length) - 1, 0) * width
    if starts_L.shape != (length,) or (starts_L != expected_L).any() or len(token_ids) != (length - 1) * width:
        raise EngineError(
            f"vLLM returned {len(token_ids)} log-probabilities in {len(starts_L)} positions for {length} tokens, "
            f"expected {width} for each token after the first: this vLLM version lays them out differently"
        )
    token_ids = token_ids.reshape(-1, width)[window.logits_index]
    logprobs = logprobs.reshape(-1, width)[window.logits_index]
    if (token_ids[:, 0] != window.target_ids).any():
        raise EngineError("vLLM's first log-probability of a position is not that of the prompt's own token")
    return window_scores(logprobs[:, 0], logprobs[:, 1:], token_ids[:, 1:])


def _vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise EngineError(f"the vllm engine needs vLLM ({error}): pip install .[teacher]") from None
    version = re.match(r"(\d+)\.(\d+)", vllm.__version__)
    if version and tuple(map(int, version.groups())) < MINIMUM_VERSION:
        raise EngineError(
            f"vLLM {vllm.__version__} is too old: flat_logprobs needs >= {'.'.join(map(str, MINIMUM_VERSION))}; "
            "pip install -U .[teacher]"
        )
    return vllm


def _refuse(message: str) -> NoReturn:
    raise ConfigError(message)


def _typed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Strings from the command line as the types that vLLM's own parser gives them. Raises ConfigError."""
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    words = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *map(str, value)] if isinstance(value, list) else [flag, str(value)]
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(exit_on_error=False))
    parser.error = _refuse  # its own prints the usage, 240 lines of it
    try:
        parsed = parser.parse_args(words)
    except (SystemExit, Exception) as error:
        raise ConfigError(f"vLLM does not take {' '.join(words)}: {error}") from None
    return {name: getattr(parsed, name) for name in arguments}

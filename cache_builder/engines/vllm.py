"""The vLLM engine: prompt log-probabilities of token-id prompts, through public interfaces (vllm >= 0.26).

`flat_logprobs` returns them as flat lists instead of one dict per token; they become arrays batch by batch, so that
memory stays bounded whatever the shard holds.

Legend: R rows of one window, K top-k ranks, L tokens of one window.
"""

import os
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np

from cache_builder.engines.base import EngineConfig, WindowScores, check_window, window_scores
from storage_specs.errors import ConfigError, EngineError
from storage_specs.windows import Window

MINIMUM_VERSION = (0, 26)
TOKENS_IN_FLIGHT = 65_536  # their log-probabilities take about half a gigabyte as Python numbers at k = 64
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
    "speculative_config": "none, because speculation corrupts prompt log-probabilities",
    "skip_tokenizer_init": "on, because prompts are token ids",
    "runner": "generate",
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
    """Scores windows with `vllm.LLM`."""

    def __init__(self, config: EngineConfig) -> None:
        for name in config.arguments:
            if name in RESERVED:
                raise ConfigError(f"{name} is not passed to vLLM: it is decided by the builder ({RESERVED[name]})")
        self.config = config
        self.version = _vllm().__version__
        self.arguments = _typed(config.arguments)
        self._llm: Any = None

    def describe(self) -> dict[str, Any]:
        from vllm.platforms import current_platform

        values = {name: value for name, value in self.config.arguments.items() if name not in RESOURCES}
        return {
            "name": "vllm",
            "version": self.version,
            "device": current_platform.device_type,
            "dtype": self.config.dtype,
            "attention_backend": str(values.pop("attention_backend", "auto")),
            "arguments": {name: value if isinstance(value, bool) else str(value) for name, value in values.items()},
        }

    def score(self, windows: Iterable[Window]) -> Iterator[WindowScores]:
        from vllm import SamplingParams

        parameters = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=self.config.k, flat_logprobs=True, detokenize=False
        )
        for batch in _batches(windows):
            for window in batch:
                check_window(window, self.config)
            prompts = [{"prompt_token_ids": window.ids.tolist()} for window in batch]
            try:
                outputs = self._load().generate(prompts, parameters, use_tqdm=False)
            except EngineError:
                raise
            except Exception as error:  # the engine's process died, ran out of memory, or refused the request
                raise EngineError(f"vLLM failed while scoring: {type(error).__name__}: {error}") from error
            for window, output in zip(batch, outputs, strict=True):
                yield parse_flat(output.prompt_logprobs, window, self.config)

    def _load(self) -> Any:
        if self._llm is None:
            os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
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
                    **self.arguments,
                )
            except Exception as error:  # pydantic, CUDA, memory: all of them mean that the engine did not start
                raise EngineError(f"teacher {self.config.model}: vLLM cannot load it: {error}") from error
        return self._llm


def _batches(windows: Iterable[Window]) -> Iterator[list[Window]]:
    """Runs of windows of at most TOKENS_IN_FLIGHT tokens together, at least one window each."""
    batch: list[Window] = []
    tokens = 0
    for window in windows:
        if batch and tokens + len(window.ids) > TOKENS_IN_FLIGHT:
            yield batch
            batch, tokens = [], 0
        batch.append(window)
        tokens += len(window.ids)
    if batch:
        yield batch


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
    try:
        parsed = parser.parse_args(words)
    except (SystemExit, Exception) as error:
        raise ConfigError(f"vLLM does not take {' '.join(words)}: {error}") from None
    return {name: getattr(parsed, name) for name in arguments}

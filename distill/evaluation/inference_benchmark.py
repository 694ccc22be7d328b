"""How large and how fast a model is on this machine: parameters, weights on disk, memory, tokens/s, latency.

Every model is measured alone in a process of its own, on the same texts, greedily, with its key-value cache, by
transformers' `generate`, end tokens forbidden. Latency is that of one text; throughput that of all texts in one batch.
The first repeats warm up and do not count; figures are medians of the others with their quartiles.

Tokens of different tokenizers are different amounts of text: beside tokens per second stands bytes per second, by the
bytes that the model's tokens have on these texts.
"""

import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from distill.students import is_adapter, load_model, load_tokenizer, model_folder
from storage_specs.errors import ConfigError
from storage_specs.model_identity import WEIGHT_PATTERNS

__all__ = ["InferenceFigures", "InferenceSettings", "Spread", "machine", "measure_apart", "measured"]

WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class InferenceSettings:
    """texts: the prompts, for all models the same. new_tokens: written behind each. repeats: that count. dtype: of the
    weights in memory. Raises ConfigError."""

    texts: tuple[str, ...]
    new_tokens: int = 32
    repeats: int = 5
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not self.texts or not all(self.texts):
            raise ConfigError("the sheet needs at least one text to go on from, and none of them empty")
        if self.new_tokens < 2 or self.repeats < 2:
            raise ConfigError(f"new_tokens is {self.new_tokens} and repeats {self.repeats}: both must be at least 2")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least two measurements."""
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median=median, q1=q1, q3=q3)


@dataclass(frozen=True, kw_only=True)
class InferenceFigures:
    """One model. weights_bytes: its weight files'. peak_bytes: memory at the peak beyond what a process without it
    holds. first_token_ms, token_ms: of one text. prefill_*, decode_*: per second, of all texts in one batch."""

    parameters: int
    parameters_without_embeddings: int
    weights_bytes: int
    peak_bytes: int
    dtype: str
    bytes_per_token: float
    first_token_ms: Spread
    token_ms: Spread
    prefill_tokens: Spread
    prefill_bytes: Spread
    decode_tokens: Spread
    decode_bytes: Spread
    batch_size: int
    new_tokens: int
    repeats: int


def measure_apart(path: str, settings: InferenceSettings) -> InferenceFigures:
    """Measure one model in a new process, which ends with it. Raises ConfigError where it cannot be loaded or run."""
    # spawn: a forked child would hold the parent's memory, and cannot use a GPU that the parent used.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(_measured_alone, path, settings, torch.get_num_threads()).result()
        except BrokenProcessPool:
            raise ConfigError(
                f"the process that measured {path} was killed, as one is that needs more memory than there is: measure "
                "fewer or shorter texts at a time, or a smaller model"
            ) from None


def _measured_alone(path: str, settings: InferenceSettings, threads: int) -> InferenceFigures:
    torch.set_num_threads(threads)
    before = _memory()
    model, tokenizer = load_model(path, settings.dtype), load_tokenizer(path)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return measured(model, tokenizer, settings, weights_bytes=weights_bytes(path), memory_before=before)


def measured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: InferenceSettings,
    *,
    weights_bytes: int,
    memory_before: int,
) -> InferenceFigures:
    """Measure a loaded model. Raises ConfigError where texts and new tokens are more than it reads."""
    ids = [tokenizer(text).input_ids for text in settings.texts]
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, ids)) + (0 if model.config.is_encoder_decoder else settings.new_tokens)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"the sheet's texts and new tokens are {longest} tokens, but the model reads at most {limit}: leave out "
            "--sheet, or this model"
        )
    single, batch = _Runs(model, tokenizer, ids[:1], settings), _Runs(model, tokenizer, ids, settings)
    tokens = sum(map(len, ids))
    bytes_per_token = sum(len(text.encode()) for text in settings.texts) / tokens
    prefill = [tokens / seconds for seconds in batch.first]
    decode = [len(ids) / seconds for seconds in batch.later]
    total, without_embeddings = parameters(model)
    return InferenceFigures(
        parameters=total,
        parameters_without_embeddings=without_embeddings,
        weights_bytes=weights_bytes,
        peak_bytes=_peak_memory() - memory_before,
        dtype=str(model.dtype).removeprefix("torch."),
        bytes_per_token=bytes_per_token,
        first_token_ms=Spread.of([1000 * seconds for seconds in single.first]),
        token_ms=Spread.of([1000 * seconds for seconds in single.later]),
        prefill_tokens=Spread.of(prefill),
        prefill_bytes=Spread.of([rate * bytes_per_token for rate in prefill]),
        decode_tokens=Spread.of(decode),
        decode_bytes=Spread.of([rate * bytes_per_token for rate in decode]),
        batch_size=len(ids),
        new_tokens=settings.new_tokens,
        repeats=settings.repeats,
    )


class _Runs:
    """Seconds to the first token, and per later token, of every repeat that counts."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        ids: Sequence[Sequence[int]],
        settings: InferenceSettings,
    ) -> None:
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        pad = next(token for token in known if token is not None)
        # On the left: what is generated stands behind the text.
        length = max(map(len, ids))
        self._inputs = {
            "input_ids": torch.tensor([[*[pad] * (length - len(one)), *one] for one in ids], device=model.device),
            "attention_mask": torch.tensor(
                [[0] * (length - len(one)) + [1] * len(one) for one in ids], device=model.device
            ),
        }
        self._how = GenerationConfig(
            max_new_tokens=settings.new_tokens,
            min_new_tokens=settings.new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=model.generation_config.eos_token_id,
            bos_token_id=model.generation_config.bos_token_id,
            decoder_start_token_id=model.generation_config.decoder_start_token_id,
        )
        self.first, self.later = [], []
        for repeat in range(WARM_UP + settings.repeats):
            first, later = self._once(model)
            if repeat >= WARM_UP:
                self.first.append(first)
                self.later.append(later)

    @torch.no_grad()
    def _once(self, model: PreTrainedModel) -> tuple[float, float]:
        clock = _Clock()
        started = _now()
        model.generate(**self._inputs, generation_config=self._how, stopping_criteria=[clock])
        first, last = clock.times[0], clock.times[-1]
        return first - started, (last - first) / (len(clock.times) - 1)


class _Clock(StoppingCriteria):
    """Notes when each token was there; never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(_now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def parameters(model: PreTrainedModel) -> tuple[int, int]:
    """All parameters, tied ones once, and those that are neither input nor output embeddings."""
    embeddings = {
        id(layer.weight)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
        if layer is not None and hasattr(layer, "weight")
    }
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    return sum(sizes.values()), sum(size for which, size in sizes.items() if which not in embeddings)


def weights_bytes(path: str) -> int:
    """Bytes of a model's weight files: of its folder, or of the snapshot of a hub name; of LoRA adapters together with
    the model that they belong to. Raises ConfigError where there are none."""
    if is_adapter(path):
        import peft

        base = peft.PeftConfig.from_pretrained(path).base_model_name_or_path
        return weights_bytes(base) + sum(file.stat().st_size for file in Path(path).glob("adapter_model.*"))
    folder = model_folder(path)
    files = next(filter(None, (list(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS)), [])
    if not files:
        raise ConfigError(f"the model {path} has no weight files ({', '.join(WEIGHT_PATTERNS)}) in {folder}")
    return sum(file.stat().st_size for file in files)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def _cpu() -> str:
    lines = cpuinfo.read_text().splitlines() if (cpuinfo := Path("/proc/cpuinfo")).exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> int:
    """Bytes that are held now: on the GPU, or resident."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return _peak_memory()  # nothing was freed before a model is loaded


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Not getrusage on Linux: a process that was just started has its parent's peak there.
    if (status := Path("/proc/self/status")).exists():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

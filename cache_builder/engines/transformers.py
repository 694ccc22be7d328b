"""The transformers engine: the numerical reference, and the default where there is no GPU.

One window at a time, without padding, in one forward pass; the head is applied at the rows' positions only
(`logits_to_keep`, so that soft caps and scales stay the model's own business). Softmax and top-k are taken in float32.

Legend: R rows of one window, B rows of one block, V vocabulary, K top-k ranks, J tail bins.
"""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from cache_builder.engines.base import EngineConfig, WindowScores, check_window, window_scores
from cache_builder.engines.reduction import tail_masses, top_k
from storage_specs.device_memory import memory_for
from storage_specs.errors import ConfigError, EngineError
from storage_specs.windows import Window

REMEDY = (
    "finished shards are kept: free the memory and run the same command again, or build elsewhere with --engine vllm, "
    "a narrower --dtype or a smaller --max_model_len"
)
# Logits turned to float32 at a time: what stays in a CPU's cache (measured: a quarter of all time); plenty for a GPU.
LOGITS_PER_BLOCK = {"cpu": 1 << 20, "cuda": 1 << 26}


class TransformersEngine:
    """Scores windows with `AutoModelForCausalLM`; device None is the GPU if there is one, else the CPU."""

    def __init__(self, config: EngineConfig, device: str | None = None) -> None:
        if config.arguments:
            names = ", ".join(config.arguments)
            raise ConfigError(f"{names}: an argument of the vllm engine, but the engine is transformers")
        self.config = config
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model: torch.nn.Module | None = None

    def describe(self) -> dict[str, Any]:
        with torch.device("meta"):  # the architecture without its weights says which attention it takes
            skeleton = _skeleton(self.config.model)
        return {
            "name": "transformers",
            "version": transformers.__version__,
            "torch": torch.__version__,
            "device": self.device,
            "dtype": self.config.dtype,
            "attention_backend": skeleton.config._attn_implementation,
        }

    def score(self, windows: Iterable[Window]) -> Iterator[WindowScores]:
        for window in windows:
            check_window(window, self.config)
            with memory_for(f"teacher {self.config.model}: a window of {len(window.ids)} tokens", REMEDY):
                scores = self._score(window)
            yield scores

    @torch.inference_mode()
    def _score(self, window: Window) -> WindowScores:
        model = self.load()
        index_R = torch.from_numpy(window.logits_index).to(self.device)
        target_R = torch.from_numpy(window.target_ids).to(self.device)
        ids = torch.from_numpy(window.ids).to(self.device)[None]
        logits_RV = model(input_ids=ids, use_cache=False, logits_to_keep=index_R).logits[0]
        if logits_RV.shape != (len(index_R), self.config.vocab_size):
            raise EngineError(
                f"{type(model).__name__} returned logits of shape {tuple(logits_RV.shape)}, expected "
                f"({len(index_R)}, {self.config.vocab_size}): this architecture is not supported"
            )
        blocks = []
        rows = max(1, LOGITS_PER_BLOCK[self.device] // self.config.vocab_size)
        for start in range(0, len(index_R), rows):
            logits_BV = logits_RV[start : start + rows].float()
            norm_B1 = logits_BV.logsumexp(dim=-1, keepdim=True)
            gold_B = (logits_BV.gather(1, target_R[start : start + rows, None]) - norm_B1)[:, 0]
            values_BK, ids_BK = top_k(logits_BV, self.config.k)
            edges = self.config.rank_edges
            bins = [] if edges is None else [tail_masses(logits_BV - norm_B1, edges)]
            blocks.append((gold_B, values_BK - norm_B1, ids_BK, *bins))
        return window_scores(*(torch.cat(parts).cpu().numpy() for parts in zip(*blocks, strict=True)))

    def close(self) -> None:
        self._model = None

    def load(self) -> torch.nn.Module:
        """The teacher's model, loaded by the first call. Raises EngineError, DeviceMemoryError."""
        if self._model is None:
            if not sys.stderr.isatty():
                transformers.utils.logging.disable_progress_bar()
            dtype = getattr(torch, self.config.dtype)
            try:
                model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                    self.config.model, dtype=dtype, output_loading_info=True
                )
            except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
                raise EngineError(f"teacher {self.config.model}: transformers cannot load it: {error}") from error
            # transformers gives them random values; tied weights that are stored once are not among them
            unread = sorted(map(str, {*loading["missing_keys"], *loading["mismatched_keys"]}))
            if unread:
                raise EngineError(
                    f"teacher {self.config.model}: {len(unread)} weights are missing from its files or have the wrong "
                    f"shape ({', '.join(unread[:3])}{', ...' if len(unread) > 3 else ''}): fetch the model again"
                )
            with memory_for(f"teacher {self.config.model}: its weights", REMEDY):
                self._model = model.to(self.device).eval()
        return self._model


def _skeleton(model: str) -> torch.nn.Module:
    try:
        config = transformers.AutoConfig.from_pretrained(model)
        return transformers.AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise EngineError(f"teacher {model}: transformers does not know this model: {error}") from error

"""Mode generate with transformers: one prompt at a time, a token at a time, with the model's own cache of keys.

The reference for other engines: temperature, then top-k, then top-p, then a draw from a generator of the sample's own.

Legend: L tokens of a prompt, G tokens of a completion, V vocabulary, K top-k ranks.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from cache_builder.engines.base import window_scores
from cache_builder.engines.generating import Generation, Prompt, StopStrings
from cache_builder.engines.reduction import tail_masses, top_k
from cache_builder.engines.transformers import REMEDY, TransformersEngine
from cache_builder.sampling import Sampling
from storage_specs.device_memory import memory_for


class TransformersGenerator:
    """Writes with the engine's model."""

    def __init__(self, engine: TransformersEngine, sampling: Sampling, words: list[bytes | None]) -> None:
        self.engine, self.sampling, self.words = engine, sampling, words

    def generate(self, prompts: Iterable[Prompt]) -> Iterator[Generation]:
        for prompt in prompts:
            tokens = f"{len(prompt.ids)} tokens and up to {prompt.max_tokens} more"
            with memory_for(f"teacher {self.engine.config.model}: a prompt of {tokens}", REMEDY):
                generation = self._generate(prompt)
            yield generation

    @torch.inference_mode()
    def _generate(self, prompt: Prompt) -> Generation:
        model, device = self.engine.load(), self.engine.device
        random = torch.Generator().manual_seed(prompt.seed)
        stop, ends = StopStrings(self.sampling.stop), set(self.sampling.stop_token_ids)
        reading, keys = torch.from_numpy(prompt.ids).to(device)[None], None
        ids: list[int] = []
        rows: list[list[torch.Tensor]] = []
        edges = self.engine.config.rank_edges
        ended, stop_reason = False, None
        while len(ids) < prompt.max_tokens and not ended and stop_reason is None:
            output = model(input_ids=reading, past_key_values=keys, use_cache=True, logits_to_keep=1)
            keys, logits_1V = output.past_key_values, output.logits[0].float()
            token = draw(logits_1V[0].cpu(), self.sampling, random)
            norm_11 = logits_1V.logsumexp(dim=-1, keepdim=True)
            values_1K, ids_1K = top_k(logits_1V, self.engine.config.k)
            parts = [logits_1V[:, token] - norm_11[:, 0], values_1K - norm_11, ids_1K]
            if edges is not None:
                parts.append(tail_masses(logits_1V - norm_11, edges))
            rows.append([part.cpu() for part in parts])
            ids.append(token)
            ended = token in ends
            if self.sampling.stop and not ended:
                stop_reason = stop.found(self.words[token] or b"")
            reading = torch.tensor([[token]], device=device)
        return Generation(
            ids=np.array(ids, dtype=np.int64),
            scores=window_scores(*(torch.cat(parts).numpy() for parts in zip(*rows, strict=True))),
            finish_reason="stop" if ended or stop_reason is not None else "length",
            ended=ended,
            stop_reason=stop_reason,
        )


def draw(logits_V: torch.Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """One token from float32 logits, in float64: temperature, then top_k, then top_p, then a draw. 0 is greedy."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probs_V, ids_V = (logits_V.double() / sampling.temperature).softmax(dim=-1).sort(descending=True, stable=True)
    if sampling.top_k:
        probs_V = probs_V[: sampling.top_k]
    probs_V = probs_V / probs_V.sum()
    if sampling.top_p < 1:  # the fewest that reach top_p: those before which less than that has come together
        before_V = probs_V.cumsum(0) - probs_V
        probs_V = probs_V[before_V < sampling.top_p]
    point = torch.rand((), generator=random, dtype=torch.float64) * probs_V.sum()
    place = int(torch.searchsorted(probs_V.cumsum(0), point, right=True))
    return int(ids_V[min(place, len(probs_V) - 1)])

"""How the teacher writes completions: vLLM's names for sampling, their rules, and a seed for every sample."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from storage_specs.document import canonical_json
from storage_specs.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature: 0 is greedy. top_p, top_k (0: all): what may be drawn, after temperature. n: samples per prompt.

    stop: strings that end a completion and are not part of it. max_tokens: of one completion, its end token included.
    stop_token_ids: the teacher's own ends of a text or turn. None of these touches the probabilities that are kept.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    seed: int = 0
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}, but must be 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}, but must be above 0 and at most 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}, but must be 0 (all) or above")
        for name in ("n", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.n > 1 and self.temperature == 0:
            raise ConfigError(f"n is {self.n} at temperature 0: greedy samples are all the same; leave n out")
        if not all(self.stop):
            raise ConfigError("stop holds an empty string, which ends every completion at once")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "stop": list(self.stop), "stop_token_ids": list(self.stop_token_ids)}

    def seed_of(self, prompt_id: str, sample: int) -> int:
        """The seed of one sample, 0 to 2^63 - 1: the same in every build, whichever worker draws it, in any order.

        The same tokens follow where the logits are the same: to the bit with transformers, while a GPU engine rounds
        differently from batch to batch, so that a resumed build continues with other samples of the same distribution.
        """
        digest = hashlib.sha256(canonical_json([self.seed, prompt_id, sample])).digest()
        return int.from_bytes(digest[:8], "little") >> 1

"""What mode generate asks of an engine: completions of prompts, and the distributions that they were drawn from.

Legend: L tokens of a prompt, G tokens of a completion, K top-k ranks.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cache_builder.engines.base import WindowScores


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One completion to write. ids: (L,) int64, prefix included. text: the same, for engines that take no ids.

    turns: of a chat, for endpoints that render it themselves; None for a plain prompt. seed: of this sample.
    max_tokens: what fits behind the prompt, at most the sampling's.
    """

    ids: np.ndarray
    text: str
    turns: list[dict[str, object]] | None
    seed: int
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One completion, token by token, an end token at its end included.

    ids: (G,) int64, or None where an endpoint gives none. pieces: the tokens' bytes, where `ids` is None; an end token
    has none, and None is for what is not known. scores: G rows at temperature 1, whatever the sampling. finish_reason:
    stop | length, or what an endpoint calls it. ended: whether the last token is an end token. stop_reason: the stop
    string that ended it, or None.
    """

    ids: np.ndarray | None
    pieces: list[bytes | None] | None = None
    scores: WindowScores
    finish_reason: str
    ended: bool
    stop_reason: str | None = None


class Generator(Protocol):
    """Writes completions with an engine that is loaded when it first writes."""

    def generate(self, prompts: Iterable[Prompt]) -> Iterator[Generation]:
        """One Generation per prompt, in order. Raises EngineError, DeviceMemoryError."""


class StopStrings:
    """Looks for stop strings in the bytes of one completion as they come. tokens: how many were looked at."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.stop = [(text, text.encode()) for text in stop]
        self.longest = max((len(data) for _, data in self.stop), default=0)
        self.data = b""
        self.tokens = 0

    def found(self, piece: bytes) -> str | None:
        """The stop string that `piece` completes, the first of them in the text, or None."""
        begin = max(0, len(self.data) - self.longest + 1)
        self.data += piece
        places = {text: self.data.find(data, begin) for text, data in self.stop}
        inside = [(place, text) for text, place in places.items() if place >= 0]
        return min(inside)[1] if inside else None

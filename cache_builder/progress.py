"""What a build has done so far, and the bar or the lines that show it in tokens."""

import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from storage_specs.document import Document


@dataclass(kw_only=True)
class Work:
    """tokens: read by the teacher, prefixes and overlaps included. windows_cut: windows beyond a document's first.

    refused: completions that are no UTF-8. cut_short: those that ended where the model's length does, before their
    max_tokens.
    """

    tokens: int = 0
    windows_cut: int = 0
    refused: int = 0
    cut_short: int = 0

    def add(self, other: "Work") -> None:
        self.tokens += other.tokens
        self.windows_cut += other.windows_cut
        self.refused += other.refused
        self.cut_short += other.cut_short


class Progress:
    """A tqdm bar in tokens; where stderr is no terminal, one line per finished shard instead.

    characters: of the documents still to be scored; the bar's total is estimated from those done. shards_done: finished
    by earlier calls, of `shards` in all.
    """

    def __init__(self, characters: int, shards_done: int, shards: int) -> None:
        self.characters, self.characters_done = characters, 0
        self.shards_done, self.shards = shards_done, shards
        self.shard_tokens, self.scored, self.last_done = 0, deque[int](), time.monotonic()
        self.bar = tqdm(unit="tok", unit_scale=True, disable=None if characters else True, smoothing=0.1)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def tokens(self, count: int) -> None:
        self.shard_tokens += count
        self.bar.update(count)

    def document_done(self, document: Document) -> None:
        self.characters_done += len(document.text)
        if self.characters_done:
            self.bar.total = round(self.bar.n * self.characters / self.characters_done)

    def shard_scored(self) -> None:
        """Call when all of a shard's tokens are counted; it is written later."""
        self.scored.append(self.shard_tokens)
        self.shard_tokens = 0

    def shard_done(self) -> None:
        """Call when a shard is written, in order; speed is since the last one, and counts loading the teacher, too."""
        self.shards_done += 1
        tokens, now = self.scored.popleft(), time.monotonic()
        if not sys.stderr.isatty():
            speed = tokens / max(1e-9, now - self.last_done)
            line = f"shard {self.shards_done} of {self.shards}: {tokens:,} tokens, {speed:,.0f} tok/s"
            print(line, file=sys.stderr, flush=True)
        self.last_done = now

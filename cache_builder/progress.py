"""What a build has done so far, and the bar that shows it in tokens."""

from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from storage_specs.document import Document


@dataclass(kw_only=True)
class Work:
    """tokens: read by the teacher, prefixes and overlaps included. windows_cut: windows beyond a document's first."""

    tokens: int = 0
    windows_cut: int = 0


class Progress:
    """A tqdm bar in tokens; silent where stderr is no terminal. The total is estimated from the characters done."""

    def __init__(self, characters: int) -> None:
        self.characters, self.characters_done = characters, 0
        self.bar = tqdm(unit="tok", unit_scale=True, disable=None if characters else True, smoothing=0.1)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def tokens(self, count: int) -> None:
        self.bar.update(count)

    def document_done(self, document: Document) -> None:
        self.characters_done += len(document.text)
        if self.characters_done:
            self.bar.total = round(self.bar.n * self.characters / self.characters_done)

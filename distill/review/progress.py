"""How far a review has come: the figures of the documents done, in a file that a killed process leaves readable."""

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from distill.kept_lines import KeptLines, undamaged

__all__ = ["Figures", "ReviewProgress"]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One document, number in the cache. student, teacher, disagreement: bits per byte of the bytes that both score."""

    number: int
    bytes: int
    student: float
    teacher: float
    disagreement: float

    @property
    def order(self) -> tuple[float, int]:
        """The larger, the sooner a reviewer sees it; equal ones in the order of the cache."""
        return (self.disagreement, -self.number)


class ReviewProgress:
    """A line of JSON for every stretch of documents: [documents, figures...]. done: documents so far.

    Raises as `KeptLines`: a file of another review stays as it is.
    """

    def __init__(self, path: Path, review: dict[str, Any]) -> None:
        self._path, self._lines = path, KeptLines(path, review)
        with undamaged(path):
            self.done = sum(line[0] for line in self._lines)

    def __iter__(self) -> Iterator[Figures]:
        """Of all documents noted so far."""
        with undamaged(self._path):
            for _, *found in self._lines:  # read line by line: a large cache has millions of documents
                for values in found:
                    yield Figures(**dict(zip(Figures.__dataclass_fields__, values, strict=True)))

    def add(self, documents: int, found: list[Figures]) -> None:
        """Note a stretch of so many documents; found: of those that can be compared."""
        self._lines.add([[documents, *map(astuple, found)]])

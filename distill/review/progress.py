"""How far a review has come: the figures of the documents done, in a file that a killed process leaves readable."""

import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from distill.checkpoint import saving

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
    """A line of JSON for the review that this is, then one for every stretch of documents: [documents, figures...].

    A file of another review is started anew; a last line that was cut off does not count. done: documents so far.
    Raises StorageFullError, OutputFolderError.
    """

    def __init__(self, path: Path, review: dict[str, Any]) -> None:
        self.path, self.done = path, 0
        head = json.dumps(review, sort_keys=True).encode() + b"\n"
        with saving(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:  # read line by line: a large cache has millions of documents
                file.seek(0)
                if file.readline() != head:
                    file.truncate(0)
                    file.write(head)
                    return
                whole = len(head)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    whole += len(line)
                    self.done += json.loads(line)[0]
                file.truncate(whole)

    def __iter__(self) -> Iterator[Figures]:
        """Of all documents noted so far."""
        with self.path.open("rb") as file:
            file.readline()
            for line in file:
                for values in json.loads(line)[1:]:
                    yield Figures(**dict(zip(Figures.__dataclass_fields__, values, strict=True)))

    def add(self, documents: int, found: list[Figures]) -> None:
        """Note a stretch of so many documents; found: of those that can be compared."""
        line = json.dumps([documents, *(astuple(figures) for figures in found)]).encode() + b"\n"
        with saving(self.path), self.path.open("ab") as file:
            file.write(line)

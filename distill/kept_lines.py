"""A file of JSON lines that grows with a long piece of work and that a killed process leaves readable.

Every file says what it belongs to; one that belongs to something else is an error, never taken over and never lost.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from distill.checkpoint import differences, saving
from storage_specs.errors import EvaluationError

__all__ = ["KeptLines", "check_same", "undamaged"]


class KeptLines:
    """A line of JSON for what the others belong to, then those that were added; they are read when they are asked for.

    path None = nothing is kept. The first line comes with the second, so that work that failed at once claims nothing.
    A last line that was cut off does not count; what is whole is never written again. Raises EvaluationError (of
    something else, damaged), StorageFullError, OutputFolderError.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any]) -> None:
        self.path, self._head = path, [identity]
        if path is None:
            return
        whole = 0
        with saving(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                file.seek(0)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    if not whole:
                        with undamaged(path):
                            check_same(path, json.loads(line), identity)
                    whole += len(line)
                file.truncate(whole)
        if whole:
            self._head = []

    def __iter__(self) -> Iterator[Any]:
        if self.path is None or self._head:
            return
        with self.path.open("rb") as file, undamaged(self.path):
            next(file)
            yield from map(json.loads, file)

    def add(self, rows: Iterable[Any]) -> None:
        """Keep some more, on the disk before this returns."""
        if self.path is None:
            return
        # ASCII: no line ends but ours
        lines = b"".join(json.dumps(row).encode() + b"\n" for row in [*self._head, *rows])
        with saving(self.path), self.path.open("ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        self._head = []


@contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Types what reading a file of another content raises: EvaluationError."""
    try:
        yield
    except EvaluationError:
        raise
    except (AttributeError, BadZipFile, EOFError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"{path} is damaged ({type(error).__name__}: {error}): remove it and start anew"
        ) from None


def check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises EvaluationError where a file is not of this work."""
    different = differences(before, now)
    if different:
        raise EvaluationError(
            f"{path} is of other, unfinished work ({different}): repeat its flags, remove it, or name "
            "another --output_file"
        )

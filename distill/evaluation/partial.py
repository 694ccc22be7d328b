"""What an interrupted evaluation leaves: a model's answers in the order they came, and its scores of held-out text.

Every file says what it belongs to; one that belongs to something else is an error, never taken over and never lost.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from distill.checkpoint import saving
from distill.evaluation.answering import Answer
from distill.scoring import Scores
from distill.text_files import write_text
from storage_specs.errors import EvaluationError

__all__ = ["AnswerFile", "kept_figures", "kept_scores"]


class AnswerFile:
    """A line of JSON for what it belongs to, then one for every answer; `answers`: by example's id, those there.

    path None = nothing is kept. A last line that was cut off does not count. Raises EvaluationError (of something
    else, damaged), StorageFullError, OutputFolderError.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any]) -> None:
        self.path, self.answers = path, {}
        if path is None:
            return
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole:
            head, *lines = data[:whole].splitlines()
            with _undamaged(path):
                before, found = json.loads(head), [_answer(json.loads(line)) for line in lines]
                _check_same(path, before, identity)
            self.answers = {answer.id: answer for answer in found}
        with saving(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.truncate(whole)  # the last line, if it was cut off; what is whole is never written again
        if not whole:
            self._append([identity])

    def add(self, answers: Sequence[Answer]) -> None:
        """Keep some more, on the disk before this returns."""
        self.answers |= {answer.id: answer for answer in answers}
        self._append([asdict(answer) for answer in answers])

    def _append(self, rows: Sequence[dict[str, Any]]) -> None:
        if self.path is None:
            return
        lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)  # ASCII: no line ends but ours
        with saving(self.path), self.path.open("ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())


def kept_scores(path: Path | None, identity: dict[str, Any], make: Callable[[], list[Scores]]) -> list[Scores]:
    """The scores in a file, or else made and put there. path None = nothing is kept. Raises as `AnswerFile`."""
    if path is not None and path.exists():
        with path.open("rb") as file, _undamaged(path), np.load(file) as arrays:
            _check_same(path, json.loads(arrays["identity"].tobytes()), identity)
            ends = np.cumsum(arrays["rows"])[:-1]
            columns = {name: np.split(arrays[name], ends) for name in Scores.__dataclass_fields__}
            documents = range(len(arrays["rows"]))
        return [Scores(**{name: column[n] for name, column in columns.items()}) for n in documents]
    scores = make()
    if path is not None:
        arrays = {name: np.concatenate([getattr(one, name) for one in scores]) for name in Scores.__dataclass_fields__}
        arrays["rows"] = np.array([len(one.nats) for one in scores])
        arrays["identity"] = np.frombuffer(json.dumps(identity).encode(), dtype=np.uint8)
        scratch = path.with_name(f".{path.name}")
        with saving(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with scratch.open("wb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
    return scores


def kept_figures(path: Path | None, identity: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """JSON figures in a file, or else made and put there. path None = nothing is kept. Raises as `AnswerFile`."""
    if path is not None and path.exists():
        with _undamaged(path):
            kept = json.loads(path.read_bytes())
            _check_same(path, kept["identity"], identity)
            return dict(kept["figures"])
    figures = make()
    if path is not None:
        write_text(path, json.dumps({"identity": identity, "figures": figures}, ensure_ascii=False))
    return figures


@contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    """Types what reading a file of another content raises: EvaluationError."""
    try:
        yield
    except EvaluationError:
        raise
    except (AttributeError, BadZipFile, EOFError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise EvaluationError(
            f"{path} is damaged ({type(error).__name__}: {error}): remove it and evaluate again"
        ) from None


def _answer(values: dict[str, Any]) -> Answer:
    answer = Answer(**values)
    if not isinstance(answer.text, str) or not isinstance(answer.prompt_cut, int):
        raise TypeError(f"{values!r:.80} is no answer")
    return answer


def _check_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    different = [
        f"{name} {before.get(name)!r}, now {now.get(name)!r}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    if different:
        raise EvaluationError(
            f"{path} is of another, unfinished evaluation ({'; '.join(different)}): repeat its flags, remove it, or "
            "name another --output_file"
        )

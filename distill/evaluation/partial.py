"""What an interrupted evaluation leaves: a model's answers in the order they came, and its scores of held-out text."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distill.checkpoint import saving
from distill.evaluation.answering import Answer
from distill.kept_lines import KeptLines, check_same, undamaged
from distill.scoring import Scores
from distill.text_files import write_text

__all__ = ["AnswerFile", "kept_figures", "kept_scores"]


class AnswerFile:
    """A line of JSON for every answer; `answers`: by example's id, those there. Raises as `KeptLines`."""

    def __init__(self, path: Path | None, identity: dict[str, Any]) -> None:
        self._lines = KeptLines(path, identity)
        self.answers = {answer.id: answer for answer in map(partial(_answer, path), self._lines)}

    def add(self, answers: Sequence[Answer]) -> None:
        """Keep some more, on the disk before this returns."""
        self.answers |= {answer.id: answer for answer in answers}
        self._lines.add(map(asdict, answers))


def kept_scores(path: Path | None, identity: dict[str, Any], make: Callable[[], list[Scores]]) -> list[Scores]:
    """The scores in a file, or else made and put there. path None = nothing is kept. Raises as `KeptLines`."""
    if path is not None and path.exists():
        with path.open("rb") as file, undamaged(path), np.load(file) as arrays:
            check_same(path, json.loads(arrays["identity"].tobytes()), identity)
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
    """JSON figures in a file, or else made and put there. path None = nothing is kept. Raises as `KeptLines`."""
    if path is not None and path.exists():
        with undamaged(path):
            kept = json.loads(path.read_bytes())
            check_same(path, kept["identity"], identity)
            return dict(kept["figures"])
    figures = make()
    if path is not None:
        write_text(path, json.dumps({"identity": identity, "figures": figures}, ensure_ascii=False))
    return figures


def _answer(path: Path, values: dict[str, Any]) -> Answer:
    with undamaged(path):
        answer = Answer(**values)
        if not isinstance(answer.text, str) or not isinstance(answer.prompt_cut, int):
            raise TypeError(f"{values!r:.80} is no answer")
        return answer

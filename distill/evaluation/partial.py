"""What an interrupted evaluation leaves: a model's answers in the order they came, and its scores of held-out text.

Every file says what it belongs to; one that belongs to something else is an error, never taken over and never lost.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        if lines:
            _check_same(path, _parsed(path, lines[0]), identity)
            try:
                found = [Answer(**_parsed(path, line)) for line in lines[1:]]
            except TypeError as error:
                raise EvaluationError(f"{path} is damaged ({error}): remove it and evaluate again") from None
            self.answers = {answer.id: answer for answer in found}
        with saving(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = lines or [json.dumps(identity, ensure_ascii=False).encode()]
            path.write_bytes(b"".join(line + b"\n" for line in whole))

    def add(self, answers: Sequence[Answer]) -> None:
        """Keep some more, on the disk before this returns."""
        self.answers |= {answer.id: answer for answer in answers}
        if self.path is None:
            return
        lines = b"".join(json.dumps(asdict(answer), ensure_ascii=False).encode() + b"\n" for answer in answers)
        with saving(self.path), self.path.open("ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())


def kept_scores(path: Path | None, identity: dict[str, Any], make: Callable[[], list[Scores]]) -> list[Scores]:
    """The scores in a file, or else made and put there. path None = nothing is kept. Raises as `AnswerFile`."""
    if path is not None and path.exists():
        with np.load(path) as arrays:
            _check_same(path, _parsed(path, arrays["identity"].tobytes()), identity)
            ends = np.cumsum(arrays["rows"])[:-1]
            columns = [np.split(arrays[name], ends) for name in Scores.__dataclass_fields__]
        return [
            Scores(**dict(zip(Scores.__dataclass_fields__, one, strict=True))) for one in zip(*columns, strict=True)
        ]
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
            scratch.replace(path)
    return scores


def kept_figures(path: Path | None, identity: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """JSON figures in a file, or else made and put there. path None = nothing is kept. Raises as `AnswerFile`."""
    if path is not None and path.exists():
        kept = _parsed(path, path.read_text(encoding="utf8"))
        _check_same(path, kept["identity"], identity)
        return kept["figures"]
    figures = make()
    if path is not None:
        write_text(path, json.dumps({"identity": identity, "figures": figures}, ensure_ascii=False))
    return figures


def _parsed(path: Path, line: bytes | str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError as error:
        raise EvaluationError(f"{path} is damaged ({error}): remove it and evaluate again") from None


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

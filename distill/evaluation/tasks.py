"""Task files: prompts with the answers that count as right, a JSON object a line.

    {"prompt": "... Question: ...\\nAnswer:", "references": ["1984", "in 1984"]}
    {"messages": [{"role": "user", "content": "..."}], "reference": "..."}
    {"prompt": "...", "reference": "yes", "choices": ["yes", "no", "maybe"]}

`id` (default: the line's number) names an example in predictions; "answer" is read as "reference". With `choices` a
model picks the one it finds likeliest, without them it writes its answer.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage_specs.errors import EvaluationError

__all__ = ["Example", "Task", "read_task", "task_from"]

ANSWERS = ("references", "reference", "answer")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question. prompt: a text, or the turns of a chat; choices: () where the answer is written."""

    id: str
    prompt: str | tuple[dict[str, str], ...]
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Task:
    """Examples that are asked and scored alike: all with choices, or none. digest: sha256 of what is asked."""

    name: str
    digest: str
    examples: tuple[Example, ...]

    @property
    def has_choices(self) -> bool:
        """Whether answers are picked, not written."""
        return bool(self.examples[0].choices)

    def first(self, count: int | None) -> "Task":
        """Its first examples."""
        return Task(name=self.name, digest=self.digest, examples=self.examples[:count])


def read_task(path: Path) -> Task:
    """A JSONL file's examples, named by the file's stem.

    Raises EvaluationError with the line's number: not readable, not JSON, a field missing or of a wrong type, an empty
    reference, an id twice, a reference that is no choice, choices in some lines only.
    """
    try:
        data = path.read_bytes()
        lines = data.decode("utf-8-sig").split("\n")  # and nowhere else: JSON texts may hold Unicode's other line ends
    except OSError as error:
        raise EvaluationError(f"the task {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise EvaluationError(f"the task {path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append((f"{path}, line {number}", str(number), json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise EvaluationError(f"{path}, line {number} is not JSON ({error}): one object a line") from None
    return _task(path.stem, rows, str(path))


def task_from(name: str, rows: list[dict[str, Any]]) -> Task:
    """The same from objects in memory. Raises as `read_task`."""
    return _task(name, [(f"{name}, example {n}", str(n), row) for n, row in enumerate(rows, start=1)], name)


def _task(name: str, rows: list[tuple[str, str, Any]], place: str) -> Task:
    examples: dict[str, Example] = {}
    for where, number, row in rows:
        example = _example(where, number, row)
        if example.id in examples:
            raise EvaluationError(f"{where}: the id {example.id!r} stands there twice: predictions are kept by id")
        examples[example.id] = example
    if not examples:
        raise EvaluationError(f"the task {place} has no examples: it needs lines with a prompt and references")
    if len({bool(example.choices) for example in examples.values()}) > 1:
        raise EvaluationError(f"the task {place} has choices in some lines only: make two tasks of it")
    asked = [[one.id, one.prompt, one.references, one.choices] for one in examples.values()]
    digest = hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()
    return Task(name=name, digest=digest, examples=tuple(examples.values()))


def _example(where: str, number: str, row: Any) -> Example:
    if not isinstance(row, dict):
        raise EvaluationError(f"{where}: expected an object with a prompt and references")
    answers = [name for name in ANSWERS if name in row]
    if len(answers) != 1 or ("prompt" in row) == ("messages" in row):
        raise EvaluationError(
            f"{where}: needs prompt or messages, and references, reference or answer; it has {', '.join(row) or 'none'}"
        )
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise EvaluationError(f"{where}: {error.object[error.start]!r} is half a character: repair the text") from None
    given = row[answers[0]]
    references = _texts(where, answers[0], [given] if isinstance(given, str) else given)
    choices = _texts(where, "choices", row["choices"]) if "choices" in row else ()
    if choices and not set(references) <= set(choices):
        raise EvaluationError(f"{where}: the reference {references[0]!r} is not one of the choices {list(choices)}")
    prompt = row["prompt"] if "prompt" in row else _turns(where, row["messages"])
    if isinstance(prompt, str) and not prompt.strip():
        raise EvaluationError(f"{where}: its prompt is empty")
    if not isinstance(prompt, str | tuple):
        raise EvaluationError(f"{where}: its prompt is not a text")
    return Example(
        id=number if row.get("id") is None else str(row["id"]), prompt=prompt, references=references, choices=choices
    )


def _texts(where: str, name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one.strip() for one in value):
        raise EvaluationError(f"{where}: {name} must be texts that are not empty, at least one; found {value!r:.80}")
    return tuple(value)


def _turns(where: str, value: Any) -> tuple[dict[str, str], ...]:
    def is_turn(turn: Any) -> bool:
        return isinstance(turn, Mapping) and all(isinstance(turn.get(key), str) for key in ("role", "content"))

    if not isinstance(value, list) or not value or not all(map(is_turn, value)):
        raise EvaluationError(f"{where}: messages must be turns with a role and a content")
    if value[-1]["role"] == "assistant":
        raise EvaluationError(f"{where}: its last turn is the assistant's: the answer belongs into references")
    return tuple(dict(turn) for turn in value)

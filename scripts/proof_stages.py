"""What must be there before a cell of scripts/proof.py can run: students, teachers, corpora, caches. Each is made once.

    WORK/SCALE/students/NAME        the whole student, cut to its first layers, and that one after a first recovery
    WORK/SCALE/teachers/TASK        Gemma-3-270M, fine-tuned on a task that a base model cannot do
    WORK/SCALE/corpora/TASK.jsonl   the documents to train on
    WORK/SCALE/caches/TASK-ANSWERS  the teacher's rows (ids of all 64 ranks, of which cells read fewer)
    WORK/SCALE/baselines/TASK-NAME  what the teacher and the untrained student score on the test documents

Every stage is made by whoever comes first, under a file lock that dies with its process; others wait for it.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import demo_assets
import proof_tasks
import torch
from cut_student import cut_student
from proof_grid import SCALES, Training
from proof_rows import lock_file

from cache_builder.main import main as cache_builder

RANKS = 64
MIN_BYTES = 400  # of a Wikipedia passage
LAYERS = 10
SHARDS = 24  # of every cache, so that some builders have enough to share
FINE_TUNING = {"epochs": 3, "rate": 5e-5}  # of the teacher, on the documents that students train on later


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The folders of one scale. teacher, student: folders; None = Gemma-3-270M and SmolLM2-135M-Instruct.

    builders: processes that share a cache's shards; one would not fill a GPU.
    """

    work: Path
    scale: str
    teacher: str | None = None
    student: str | None = None
    builders: int = 6 if torch.cuda.is_available() else 1

    @property
    def folder(self) -> Path:
        return self.work / self.scale

    def training(self, task: str) -> Training:
        return SCALES[self.scale][task]

    # ---- students

    def student_path(self, name: str) -> Path:
        """The folder of a student: `smollm2`, `smollm2-10`, or `smollm2-10-healed`, which has learned Wikipedia text by
        CE alone (a cut student knows no language, and would learn no task from some hundred examples)."""
        whole = self.student or str(demo_assets.smollm2_path())
        if name == "smollm2":
            return Path(whole)
        cut, path = self.folder / "students" / "smollm2-10", self.folder / "students" / name
        self.once(cut, lambda scratch: _replace(cut_student(whole, LAYERS, scratch / "cut"), scratch))
        if name == "smollm2-10-healed":
            self.once(path, lambda scratch: self._heal(cut, scratch))
        elif name != "smollm2-10":
            raise ValueError(f"no student {name!r}")
        return path

    def _heal(self, cut: Path, scratch: Path) -> None:
        from proof_cell import Laboratory, train_once
        from proof_grid import RATES, Cell

        rate = RATES["smollm2-10"][1]
        cell = Cell(
            scale=self.scale, task="wikipedia", student="smollm2-10", arm="ce", learning_rate=rate, seed=9
        )  # a seed of its own: its order of documents is nobody else's
        laboratory = Laboratory(self)
        model, _ = train_once(laboratory, cell)
        model.to(torch.float32).save_pretrained(scratch)
        laboratory.tokenizer(cut).save_pretrained(scratch)

    # ---- teachers

    def teacher_path(self, task: str) -> Path:
        """The folder of a task's teacher: the base model for plain text, else one fine-tuned on the task."""
        base = Path(self.teacher or demo_assets.gemma_path())
        if task == "wikipedia":
            return base
        path = self.folder / "teachers" / task
        self.once(path, lambda scratch: self._fine_tune(base, task, scratch))
        return path

    def _fine_tune(self, base: Path, task: str, scratch: Path) -> None:
        from proof_teacher import fine_tune

        training = self.training(task)
        documents = proof_tasks.documents(task, "train", training.documents)
        fine_tune(base, documents, scratch, batch=training.batch, max_length=2 * training.max_length, **FINE_TUNING)

    # ---- caches

    def cache_path(self, task: str, answers: str = "given") -> Path:
        """The folder of a finished cache of a task's documents, or of the teacher's own answers to their prompts."""
        path = self.folder / "caches" / f"{task}-{answers}"
        with self._locked(path):
            if not (path / "manifest.json").exists():
                self._build(path, task, answers)
        return path

    def _build(self, path: Path, task: str, answers: str) -> None:
        training = self.training(task)
        flags: dict[str, Any] = {
            "teacher": self.teacher_path(task),
            "output": path,
            "k": RANKS,
            "k_ids": RANKS,
            "engine": "transformers",
            "dtype": "bfloat16",
            "documents_per_shard": -(-training.documents // SHARDS),
        }
        if task == "wikipedia":
            text = {"corpus": demo_assets.wikipedia_path(), "min_bytes": MIN_BYTES, "max_model_len": 1024}
            flags |= {**text, "max_documents": training.documents}
        else:
            flags["corpus"] = self._corpus(task)
            if answers == "teacher":
                flags |= {"mode": "generate", "temperature": 0, "max_tokens": training.max_new_tokens}
        self._run_builders(flags)

    def _corpus(self, task: str) -> Path:
        path = self.folder / "corpora" / f"{task}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}-{os.getpid()}")
        with scratch.open("w", encoding="utf8") as file:
            for document in proof_tasks.documents(task, "train", self.training(task).documents):
                record = {"prompt": document.content(0), "completion": document.content(1)}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        scratch.replace(path)
        return path

    def _run_builders(self, flags: dict[str, Any]) -> None:
        """`cache-builder build`, in this process or in several that share the shards. Exits where one of them fails."""
        words = ["build", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
        if self.builders == 1:
            with redirect_stdout(StringIO()):  # its summary
                cache_builder(words)
            return
        each = -(-SHARDS // self.builders)
        command = [sys.executable, "-m", "cache_builder", *words, "--shard_range"]
        builders = [
            subprocess.Popen([*command, f"{first}:{first + each}"], stdout=subprocess.DEVNULL)
            for first in range(0, SHARDS, each)
        ]
        if any([builder.wait() for builder in builders]):
            sys.exit(f"error: the cache {flags['output']} was not built (the lines above say why): mend it and rerun")

    # ---- making a thing once

    def once(self, path: Path, make: Callable[[Path], None]) -> None:
        """`path`, a folder that `make(scratch)` fills and that then appears whole."""
        with self._locked(path):
            if path.exists():
                return
            scratch = path.with_name(f".{path.name}")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            make(scratch)
            scratch.rename(path)

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        with lock_file(self.folder, "-".join(path.parts[-2:])).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _replace(made: Path, scratch: Path) -> None:
    """The files of `made`, a folder inside `scratch`, as those of `scratch` itself."""
    for file in made.iterdir():
        file.rename(scratch / file.name)
    made.rmdir()

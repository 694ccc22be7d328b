"""What must be there before a cell of scripts/proof.py can run: students, teachers, corpora, caches. Each is made once.

    WORK/SCALE/students/NAME        the whole student, cut to its first layers, and that one after a first recovery
    WORK/SCALE/teachers/TASK        Gemma-3-270M, fine-tuned on a task that a base model cannot do
    WORK/SCALE/corpora/TASK.jsonl   the documents to train on
    WORK/SCALE/caches/TASK-ANSWERS  the teacher's rows (ids of all 64 ranks, of which cells read fewer)
    WORK/SCALE/baselines/TASK-NAME  what the teacher and the untrained student score on the test documents

Every stage is made by whoever comes first, under a file lock that dies with its process; others wait for it. Beside it
lies NAME.made.json, what it was made with: a stage that was made with anything else is refused, never used.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from functools import cache as cached
from io import StringIO
from pathlib import Path
from typing import Any

import demo_assets
import proof_tasks
import torch
from cut_student import cut_student
from proof_grid import ARMS, SCALES, Training
from proof_rows import lock_file

from cache_builder.main import main as cache_builder
from storage_specs.errors import ConfigError
from storage_specs.model_identity import weights_digest

Settings = dict[str, Any]  # all that decides what a stage holds, as JSON values

RANKS = 64
MIN_BYTES = 400  # of a Wikipedia passage
LAYERS = 10
SHARDS = 24  # of every cache, so that some builders have enough to share
HEALING_RATE = 4e-3
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
    builders: int = 4 if torch.cuda.is_available() else 1

    @property
    def folder(self) -> Path:
        return self.work / self.scale

    def training(self, task: str) -> Training:
        return SCALES[self.scale][task]

    # ---- students

    def student_path(self, name: str) -> Path:
        """The folder of a student: `smollm2`, `smollm2-10`, or `smollm2-10-healed`, which has learned Wikipedia text by
        CE alone (a cut student knows no language, and would learn no task from some hundred examples)."""
        if name == "smollm2":
            return Path(self.student or demo_assets.smollm2_path())
        path = self.folder / "students" / name
        if name == "smollm2-10":
            whole = str(self.student_path("smollm2"))
            make = lambda scratch: _replace(cut_student(whole, LAYERS, scratch / "cut"), scratch)  # noqa: E731
        elif name == "smollm2-10-healed":
            cut = self.student_path("smollm2-10")
            make = lambda scratch: self._heal(cut, scratch)  # noqa: E731
        else:
            raise ValueError(f"no student {name!r}")
        return self.once(path, self.student_settings(name), make)

    def student_settings(self, name: str) -> Settings:
        if name == "smollm2":
            return {"weights": _weights(self.student_path(name))}
        if name == "smollm2-10":
            return {"whole": self.student_settings("smollm2"), "layers": LAYERS}
        how = {"arm": asdict(ARMS["ce"]), "rate": HEALING_RATE, "training": asdict(self.training("wikipedia"))}
        return {"cut": self.student_settings("smollm2-10"), "cache": self.cache_settings("wikipedia", "given"), **how}

    def _heal(self, cut: Path, scratch: Path) -> None:
        from proof_cell import Laboratory, train_once
        from proof_grid import Cell

        cell = Cell(
            scale=self.scale, task="wikipedia", student="smollm2-10", arm="ce", learning_rate=HEALING_RATE, seed=9
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
        return self.once(path, self.teacher_settings(task), lambda scratch: self._fine_tune(base, task, scratch))

    def teacher_settings(self, task: str) -> Settings:
        if task == "wikipedia":
            return {"weights": _weights(self.teacher_path(task))}
        training = {name: getattr(self.training(task), name) for name in ("documents", "batch", "max_length")}
        return {"base": self.teacher_settings("wikipedia"), **training, **FINE_TUNING}

    def _fine_tune(self, base: Path, task: str, scratch: Path) -> None:
        from proof_teacher import fine_tune

        training = self.training(task)
        documents = proof_tasks.documents(task, "train", training.documents)
        fine_tune(base, documents, scratch, batch=training.batch, max_length=2 * training.max_length, **FINE_TUNING)

    # ---- caches

    def cache_path(self, task: str, answers: str = "given") -> Path:
        """The folder of a finished cache of a task's documents, or of the teacher's own answers to their prompts."""
        path = self.folder / "caches" / f"{task}-{answers}"
        with self._alone(path, self.cache_settings(task, answers)):
            if not (path / "manifest.json").exists():
                corpus = demo_assets.wikipedia_path() if task == "wikipedia" else self._corpus(task)
                given = {"teacher": self.teacher_path(task), "corpus": corpus, "output": path}
                self._run_builders(given | self._cache_flags(task, answers))
        return path

    def cache_settings(self, task: str, answers: str) -> Settings:
        documents = self.training(task).documents
        return {"teacher": self.teacher_settings(task), "documents": documents, **self._cache_flags(task, answers)}

    def _cache_flags(self, task: str, answers: str) -> dict[str, Any]:
        """Of `cache-builder build`, but for its paths."""
        training = self.training(task)
        flags: dict[str, Any] = {"k": RANKS, "k_ids": RANKS, "engine": "transformers", "dtype": "bfloat16"}
        flags["documents_per_shard"] = -(-training.documents // SHARDS)
        if task == "wikipedia":
            flags |= {"min_bytes": MIN_BYTES, "max_model_len": 1024, "max_documents": training.documents}
            if self.scale == "gpu":  # several times faster; told how much memory to take, since others share its GPU
                flags |= {"engine": "vllm", "gpu_memory_utilization": 0.1, "enforce_eager": True}
                flags |= {"kv_cache_memory_bytes": 4 << 30}
        elif answers == "teacher":
            flags |= {"mode": "generate", "temperature": 0, "max_tokens": training.max_new_tokens}
        return flags

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
        words = ["build"]
        for name, value in flags.items():
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        if self.builders == 1:
            with redirect_stdout(StringIO()):  # its summary
                cache_builder(words)
            return
        each = SHARDS if flags["engine"] == "vllm" else -(-SHARDS // self.builders)  # one of vLLM's fills a GPU
        command = [sys.executable, "-m", "cache_builder", *words, "--shard_range"]
        builders = [
            subprocess.Popen([*command, f"{first}:{first + each}"], stdout=subprocess.DEVNULL)
            for first in range(0, SHARDS, each)
        ]
        if any([builder.wait() for builder in builders]):
            sys.exit(f"error: the cache {flags['output']} was not built (the lines above say why): mend it and rerun")

    # ---- making a thing once

    def once(self, path: Path, settings: Settings, make: Callable[[Path], None]) -> Path:
        """`path`, a folder that `make(scratch)` fills and that then appears whole. Raises ConfigError as `_alone`."""
        with self._alone(path, settings):
            if not path.exists():
                scratch = path.with_name(f".{path.name}")
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir(parents=True)
                make(scratch)
                scratch.rename(path)
        return path

    @contextmanager
    def _alone(self, path: Path, settings: Settings) -> Iterator[None]:
        """Nobody else is at work on a stage. Raises ConfigError where it was made with other settings than these."""
        with lock_file(self.folder, "-".join(path.parts[-2:])).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            note = path.with_name(f"{path.name}.made.json")
            if not path.exists():
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(json.dumps(settings), encoding="utf8")
            before = json.loads(note.read_text(encoding="utf8")) if note.exists() else {}
            if other := [name for name in {**before, **settings} if before.get(name) != settings.get(name)]:
                raise ConfigError(f"{path} was made with other settings ({', '.join(other)}): remove it and rerun")
            yield


@cached
def _weights(folder: Path) -> str | None:
    """What tells a model from another in the same folder."""
    return weights_digest(folder)


def _replace(made: Path, scratch: Path) -> None:
    """The files of `made`, a folder inside `scratch`, as those of `scratch` itself."""
    for file in made.iterdir():
        file.rename(scratch / file.name)
    made.rmdir()

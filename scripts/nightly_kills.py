"""SIGKILL builds at random moments of every phase, resume them, and compare with a build that nobody disturbed.

    python scripts/nightly_kills.py --trials 60                  # a piece of some minutes; pieces add up in the CSV
    python scripts/nightly_kills.py --trials 2 --teacher gemma   # the real Gemma-3-270M instead of a small random model
    python scripts/nightly_kills.py --trials 9 --teacher tiny    # SmolLM2's first 2,048 words instead of all of Gemma's

The teacher is a random model of two layers under Gemma's real tokenizer (262,144 words), scored by the transformers
engine. Every trial is a forked process, in which nothing is left to import; so is every resumption. A first,
undisturbed build tells when each phase begins and how long it lasts. A trial draws a phase, a random moment of all the
time spent in it, waits until the phase is there, sleeps the rest, and sends SIGKILL; a phase that would end before then
stops at its end, so that no busy machine is too late. Counted is the phase in which the signal really came: the process
notes it in shared memory (of several that go on at once, the one aimed at).

    plan      corpus, teacher, settings, what is there already; and plan.json
    score     the teacher at work
    encode    a scored shard becomes bytes
    commit    these are written, the commit record last
    manifest  shards.parquet, documents.parquet, manifest.json

In every other trial `gc` runs before the resumption and removes what the killed process left. The resumed folder must
be byte for byte the undisturbed one, and hold nothing else.
"""

import argparse
import csv
import dataclasses
import hashlib
import json
import mmap
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import demo_assets
import pyarrow
import torch
from random_teacher import make_random_teacher
from tqdm import tqdm
from tqdm.std import TqdmDefaultWriteLock

from cache_builder import preparation
from cache_builder.build_config import BuildConfig
from cache_builder.builder import build
from cache_builder.engines.transformers import TransformersEngine
from cache_builder.teacher import Teacher
from storage_specs import planned_cache, writer
from storage_specs.errors import NotACacheError
from storage_specs.garbage import collect_garbage
from storage_specs.planned_cache import PlannedCache
from storage_specs.vocabulary_table import vocabulary_to_bytes

# tqdm's lock is one for all forks: a process that is killed while it draws a bar leaves it locked for all others, for
# ever. Nor may a thread of tqdm's hold one while this process forks.
TqdmDefaultWriteLock.mp_lock, tqdm.monitor_interval = None, 0
PHASES = ("plan", "score", "encode", "commit", "manifest")
SHARDS, DOCUMENTS_PER_SHARD, CHARACTERS = 3, 2, 200
PATIENCE = 120.0  # seconds, for a machine that does other things, too


class Clock:
    """Shared memory of a build and its killer: how often each phase has begun, and in how many threads it goes on."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 2 * len(PHASES))

    def reset(self) -> None:
        self.memory[:] = bytes(len(self.memory))

    def begun(self, phase: str) -> int:
        return self.memory[PHASES.index(phase)]

    def active(self) -> list[str]:
        """The phases that go on: while one shard is written, the next one is scored."""
        return [phase for number, phase in enumerate(PHASES) if self.memory[len(PHASES) + number]]

    def enter(self, phase: str) -> None:
        self.memory[PHASES.index(phase)] += 1
        self.memory[len(PHASES) + PHASES.index(phase)] += 1

    def leave(self, phase: str) -> None:
        self.memory[len(PHASES) + PHASES.index(phase)] -= 1


class Watched:
    """In the forked process: tells the clock which phases begin and end, and notes when.

    aim: the phase, and its how-manieth stretch, at whose end it waits to be killed.
    """

    def __init__(self, clock: Clock, aim: tuple[str, int] | None = None) -> None:
        self.clock, self.aim, self.lock = clock, aim, threading.Lock()
        self.spans: list[tuple[str, float, float]] = []
        self.planning: float | None = time.monotonic()
        clock.enter("plan")
        for place, name, phase in (
            (TransformersEngine, "_score", "score"),
            (writer, "encoded_shard", "encode"),
            (PlannedCache, "commit_shard", "commit"),
            (PlannedCache, "claim", "plan"),
            (planned_cache, "commit", "manifest"),
        ):
            setattr(place, name, self.wrapped(getattr(place, name), phase))

    def wrapped(self, real: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """Every call of the function is one stretch of the phase; the first one of any ends the planning."""

        def call(*arguments: Any, **options: Any) -> Any:
            started = time.monotonic()
            with self.lock:
                if self.planning is not None:
                    self.wait_at_end_of("plan", 1)
                    self.spans.append(("plan", self.planning, started))
                    self.planning = None
                    self.clock.leave("plan")
                self.clock.enter(phase)
                number = self.clock.begun(phase)
            try:
                return real(*arguments, **options)
            finally:
                self.wait_at_end_of(phase, number)
                with self.lock:
                    self.spans.append((phase, started, time.monotonic()))
                    self.clock.leave(phase)

        return call

    def wait_at_end_of(self, phase: str, number: int) -> None:
        if self.aim == (phase, number):
            time.sleep(2 * PATIENCE)


def forked(work: Callable[[], Any], kill: Callable[[int], None] | None = None) -> Any:
    """What `work` returns in a forked process, by way of JSON; None where it was killed. Raises RuntimeError."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        try:
            with open(os.devnull, "w") as quiet:
                sys.stderr = quiet
                result = work()
            os.write(writing, json.dumps(result).encode())
        except BaseException:
            os.write(writing, json.dumps({"error": traceback.format_exc()}).encode())
        os._exit(0)
    os.close(writing)
    if kill is not None:
        kill(process)
    with open(reading, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return None
    result = json.loads(told)
    if isinstance(result, dict) and "error" in result:
        raise RuntimeError(result["error"])
    return result


@dataclasses.dataclass(frozen=True)
class Trials:
    """Kills and resumes one build, over and over. `spans`: (phase, its how-manieth beginning, seconds) of one build."""

    config: BuildConfig
    folder: Path
    whole: dict[str, str]
    spans: tuple[tuple[str, int, float], ...]
    clock: Clock

    @classmethod
    def of(cls, config: BuildConfig, folder: Path) -> "Trials":
        """Builds once undisturbed, and once more to time the phases."""
        clock = Clock()
        forked(partial(_build, config, folder / "whole", clock))
        spans = forked(partial(_build, config, folder / "timed", clock))
        counted: Counter[str] = Counter()
        numbered = []
        for phase, started, ended in sorted(spans, key=lambda span: span[1]):
            counted[phase] += 1
            numbered.append((phase, counted[phase], ended - started))
        whole = digests(folder / "whole")
        if digests(folder / "timed") != whole:
            raise RuntimeError("two undisturbed builds differ: there is nothing to compare with")
        return cls(config=config, folder=folder, whole=whole, spans=tuple(numbered), clock=clock)

    def moment(self, chance: random.Random, phase: str) -> tuple[int, float]:
        """(how-manieth beginning, seconds after it) of a random moment of all the time that the phase takes."""
        spans = [(number, seconds) for name, number, seconds in self.spans if name == phase]
        number, seconds = chance.choices(spans, weights=[seconds for _, seconds in spans])[0]
        return number, chance.uniform(0, seconds)

    def trial(self, chance: random.Random, phase: str, clean: bool) -> dict[str, Any]:
        """{"hit": the phase that was killed, "between" two, or "none"; "same": bool; "orphans": objects that gc
        removed, or None}."""
        output = self.folder / "trial"
        number, delay = self.moment(chance, phase)
        self.clock.reset()

        def kill(process: int) -> None:
            deadline = time.monotonic() + PATIENCE
            while self.clock.begun(phase) < number and time.monotonic() < deadline:
                time.sleep(0.0001)
            time.sleep(delay)
            os.kill(process, signal.SIGKILL)

        survived = forked(partial(_build, self.config, output, self.clock, (phase, number)), kill) is not None
        active = self.clock.active()
        hit = "none" if survived else phase if phase in active else next(iter(active), "between")
        orphans = None
        if clean:
            try:
                orphans = len(forked(partial(_clean, output)))
            except RuntimeError as error:
                if NotACacheError.__name__ not in str(error):  # killed before plan.json stood
                    raise
                orphans = 0
        forked(partial(_build, self.config, output, self.clock))
        same = digests(output) == self.whole
        if same:
            shutil.rmtree(output)
        else:
            output.rename(self.folder / f"different-{time.monotonic_ns()}")
        return {"hit": hit, "same": same, "orphans": orphans}

    def run(self, trials: int, seed: int, told: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
        """Trials that aim at each phase in turn; every other one of each phase runs gc."""
        chance, found = random.Random(seed), []
        for number in range(trials):
            result = self.trial(chance, PHASES[number % len(PHASES)], clean=number // len(PHASES) % 2 == 1)
            found.append(result)
            told(result)
        return found


def _build(
    config: BuildConfig, output: Path, clock: Clock, aim: tuple[str, int] | None = None
) -> list[tuple[str, float, float]]:
    watched = Watched(clock, aim)
    build(dataclasses.replace(config, output=output))
    return watched.spans


def _clean(output: Path) -> list[str]:
    return [name for name, _ in collect_garbage(output, grace=0).removable]


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file, by its name."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def make_teacher(folder: Path, teacher: str) -> Path:
    """The folder of the teacher of that name (--teacher)."""
    if teacher == "gemma":
        return demo_assets.gemma_path()
    if teacher == "tiny":
        return make_random_teacher(folder, demo_assets.smollm2_path(), 2048)
    return make_random_teacher(folder, demo_assets.gemma_path(), hidden_size=8)


def prepare(folder: Path, teacher: str, store: str) -> BuildConfig:
    """The build that is killed; what it reads is made, and what costs a start is loaded, before anything forks."""
    model = make_teacher(folder / "teacher", teacher)
    with demo_assets.wikipedia_path().open(encoding="utf8") as lines:
        texts = [json.loads(line)["text"][:CHARACTERS] for line in islice(lines, SHARDS * DOCUMENTS_PER_SHARD)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    preparation.find_teacher = cache(
        preparation.find_teacher
    )  # the tokenizer is read and digested once, not in every trial
    preparation._vocabulary = cache(preparation._vocabulary)
    Teacher.tokenizer_identity = cache(Teacher.tokenizer_identity)
    config = BuildConfig(
        teacher=str(model),
        corpus=str(folder / "corpus.jsonl"),
        output=folder / "none",
        engine="transformers",
        documents_per_shard=DOCUMENTS_PER_SHARD,
        max_model_len=128,
        store=store,
    )
    recipe = preparation.prepare(config).recipe
    vocabulary_to_bytes(recipe.settings.vocabulary)  # loads what Arrow needs
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher", choices=["random", "gemma", "tiny"], default="random")
    parser.add_argument("--store", choices=["zarr", "arrow"], default="zarr")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "kills.csv")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trials = Trials.of(prepare(folder, arguments.teacher, arguments.store), folder)
        seconds: Counter[str] = Counter()
        for phase, _, length in trials.spans:
            seconds[phase] += length
        print({phase: round(length, 3) for phase, length in seconds.items()}, flush=True)
        results = trials.run(arguments.trials, arguments.seed, lambda result: print(result, flush=True))
    rows = []
    for phase in (*PHASES, "between", "none"):
        of_phase = [result for result in results if result["hit"] == phase]
        rows.append(
            {
                "teacher": arguments.teacher,
                "store": arguments.store,
                "seed": arguments.seed,
                "phase_hit": phase,
                "trials": len(of_phase),
                "resumed_identical": sum(result["same"] for result in of_phase),
                "gc_runs": sum(result["orphans"] is not None for result in of_phase),
                "orphans_removed": sum(result["orphans"] or 0 for result in of_phase),
                "phase_seconds": round(seconds[phase], 3),
                "minutes": round((time.monotonic() - started) / 60, 1),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "python": platform.python_version(),
                "torch": torch.__version__,
                "pyarrow": pyarrow.__version__,
            }
        )
        print(*rows[-1].values(), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    new = not arguments.output.exists()
    with arguments.output.open("a", newline="", encoding="utf8") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            table.writeheader()
        table.writerows(rows)
    if not all(result["same"] for result in results):
        sys.exit("a resumed build differs from the undisturbed one")


if __name__ == "__main__":
    main()

"""Cache a teacher once, train three students from the cache, and say what helped.

    bash scripts/quickstart.sh                                          # set-up, then this file with its defaults
    python scripts/quickstart.py --teacher Qwen/Qwen3-0.6B --student HuggingFaceTB/SmolLM2-135M --corpus my.jsonl

Stages: models and text -> cache-builder build, verify, inspect -> distill train (three arms) -> distill evaluate.
The arms see the same batches in the same order: `ce_only` (cross entropy alone, the control), `uld` (CE + ULD at shared
byte boundaries) and `mapped` (CE + the teacher's words mapped to the student's). The student is cut to its first
`--student_layers` layers, because the whole one is slow on two cores; `before` is that cut student, untrained.
Writes runs/quickstart/{cache,arms/<arm>,model,evaluation.json}; a second run resumes what an interrupted one began.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import demo_assets

SCRIPTS = Path(__file__).parent
ARMS = {
    "ce_only": {"loss": "ce:1"},
    "uld": {"loss": "ce:1,uld:1.5", "align": "boundary"},
    "mapped": {"loss": "ce:1,mapped:1"},
}


class Stages:
    """Runs commands one after the other and remembers how long each took and how much memory it held."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float]] = []

    def run(self, name: str, *command: str) -> None:
        """`python COMMAND`. Stages are processes of their own: this one stays small, so that their peaks are theirs."""
        print(f"\n== {name}: python {' '.join(command)}", flush=True)
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command])
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            process.wait()
            sys.exit(130)
        unit = 2**30 if sys.platform == "darwin" else 2**20
        self.rows.append((name, time.perf_counter() - started, usage.ru_maxrss / unit))
        if code := os.waitstatus_to_exitcode(status):
            sys.exit(f"error: {name} failed with exit code {code}; mend its cause and run the same command to resume")

    def table(self) -> str:
        lines = [f"{'stage':<18} {'seconds':>8} {'peak GiB':>9}"]
        lines += [f"{name:<18} {seconds:>8.0f} {gib:>9.1f}" for name, seconds, gib in self.rows]
        return "\n".join([*lines, f"{'total':<18} {sum(row[1] for row in self.rows):>8.0f}"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="hub name or local folder (default: Gemma-3-270M from packages)")
    parser.add_argument("--student", help="hub name or local folder (default: SmolLM2-135M-Instruct from packages)")
    parser.add_argument("--corpus", help="anything that cache-builder build takes (default: Wikipedia passages)")
    parser.add_argument("--student_layers", type=int, default=10, help="first layers kept; 0 keeps all (default: 10)")
    parser.add_argument("--documents", type=int, default=200, help="passages scored (default: 200)")
    parser.add_argument(
        "--dtype", default="float32", help="the teacher's; bfloat16 is slower on most CPUs (default: float32)"
    )
    parser.add_argument("--min_bytes", type=int, default=400, help="shorter passages are passed over (default: 400)")
    parser.add_argument("--steps", type=int, default=30, help="optimisation steps of each arm (default: 30)")
    # Six Wikipedia passages of at least 400 bytes: over 512 tokens in every step of the default run.
    parser.add_argument("--documents_per_step", type=int, default=6, help="global batch size (default: 6)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="peak, the same for all arms (default: 1e-3)")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="(default: runs/quickstart)")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    stages, out = Stages(), options.output
    (out / "arms").mkdir(parents=True, exist_ok=True)

    chosen = {"teacher": options.teacher, "student": options.student, "text": options.corpus}
    if missing := [name for name, choice in chosen.items() if choice is None]:
        stages.run("models and text", str(SCRIPTS / "demo_assets.py"), *missing)
    teacher = options.teacher or str(demo_assets.gemma_path())
    student = options.student or str(demo_assets.smollm2_path())
    corpus = options.corpus or str(demo_assets.wikipedia_path())
    before = out / "before"
    layers = str(options.student_layers)
    stages.run("cut student", str(SCRIPTS / "cut_student.py"), student, str(before), "--layers", layers)

    cache = str(out / "cache")
    build = {
        "teacher": teacher,
        "corpus": corpus,
        "output": cache,
        "k": 64,
        "k_ids": 16,
        "dtype": options.dtype,
        "documents_per_shard": 25,
        "min_bytes": options.min_bytes,
        "max_documents": options.documents,
    }
    stages.run("build", "-m", "cache_builder", "build", *flags(build))
    stages.run("verify", "-m", "cache_builder", "verify", cache)
    stages.run("inspect", "-m", "cache_builder", "inspect", cache)
    for arm, losses in ARMS.items():
        train = {
            "model_name_or_path": before,
            "cache": cache,
            "output_dir": out / "arms" / arm,
            **losses,
            "seed": 0,
            "max_steps": options.steps,
            "per_device_train_batch_size": options.documents_per_step,
            "learning_rate": options.learning_rate,
            "warmup_steps": 5,
            "lr_scheduler_type": "cosine",
            "logging_steps": 10,
            "save_steps": 20,
            "save_total_limit": 1,
        }
        stages.run(f"train {arm}", "-m", "distill", "train", *flags(train))
    shutil.copytree(
        out / "arms" / "uld", out / "model", dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*")
    )
    evaluation = out / "evaluation.json"
    named = [f"before={before}", *(f"{arm}={out / 'arms' / arm}" for arm in ARMS)]
    named = [word for model in named for word in ("--model", model)]
    stages.run("evaluate", "-m", "distill", "evaluate", "--cache", cache, *named, "--output_file", str(evaluation))

    print(f"\n{stages.table()}\n\ncache: {cache}\nmodel: {out / 'model'}\nevaluation: {evaluation}")
    models = json.loads(evaluation.read_text(encoding="utf8"))["models"]
    scores = {name: model["metrics"]["bits_per_byte"]["value"] for name, model in models.items()}
    if worse := [arm for arm in ARMS if scores[arm] >= scores["before"]]:
        sys.exit(f"error: {', '.join(worse)} did not get below `before` ({scores['before']:.3f} bits per byte)")


def flags(values: dict[str, Any]) -> list[str]:
    """`--name value` for every item."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


if __name__ == "__main__":
    main()

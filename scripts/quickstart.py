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
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import demo_assets

ARMS = {
    "ce_only": {"uld_weight": 0},
    "uld": {"uld_weight": 1.5, "align": "boundary"},
    "mapped": {"uld_weight": 0, "mapped_weight": 1},
}


class Stages:
    """Runs commands one after the other and remembers how long each took and how much memory it held."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float]] = []

    def run(self, name: str, *command: str) -> None:
        print(f"\n== {name}: {' '.join(command)}", flush=True)
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", *command])
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            process.wait()
            sys.exit(130)
        self.add(name, time.perf_counter() - started, usage.ru_maxrss)
        if code := os.waitstatus_to_exitcode(status):
            sys.exit(f"error: {name} failed with exit code {code}; mend its cause and run the same command to resume")

    def add(self, name: str, seconds: float, maxrss: int) -> None:
        unit = 2**30 if sys.platform == "darwin" else 2**20
        self.rows.append((name, seconds, maxrss / unit))

    def table(self) -> str:
        lines = [f"{'stage':<18} {'seconds':>8} {'peak GiB':>9}"]
        lines += [f"{name:<18} {seconds:>8.0f} {gib:>9.1f}" for name, seconds, gib in self.rows]
        return "\n".join([*lines, f"{'total':<18} {sum(row[1] for row in self.rows):>8.0f}"])


def cut_student(student: str, layers: int, output: Path) -> Path:
    """The first `layers` layers of a student, with its tokenizer, as an ordinary model folder (0 = all of them)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    # The report of weights that were not loaded is the purpose here, and the bars would only blink.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    made_from = {"student": student, "layers": layers}
    record = output / "made_from.json"
    if record.exists() and json.loads(record.read_text(encoding="utf8")) != made_from:
        sys.exit(f"error: {output} holds another student: {record.read_text(encoding='utf8')}; choose another --output")
    if not record.exists():
        keep = {"num_hidden_layers": layers} if layers else {}
        model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32, **keep)
        scratch = output.with_name(f".{output.name}")
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(student).save_pretrained(scratch)
        (scratch / record.name).write_text(json.dumps(made_from), encoding="utf8")
        scratch.rename(output)
    return output


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

    print(f"== models and text: made once under {demo_assets.home()}", flush=True)
    started = time.perf_counter()
    teacher = options.teacher or str(demo_assets.gemma_path())
    student = options.student or str(demo_assets.smollm2_path())
    corpus = options.corpus or str(demo_assets.wikipedia_path())
    before = cut_student(student, options.student_layers, out / "before")
    stages.add("models and text", time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

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
    stages.run("build", "cache_builder", "build", *flags(build))
    stages.run("verify", "cache_builder", "verify", cache)
    stages.run("inspect", "cache_builder", "inspect", cache)
    for arm, weights in ARMS.items():
        train = {
            "model_name_or_path": before,
            "cache": cache,
            "output_dir": out / "arms" / arm,
            **weights,
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
        stages.run(f"train {arm}", "distill", "train", *flags(train))
    shutil.copytree(
        out / "arms" / "uld", out / "model", dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*")
    )
    evaluation = out / "evaluation.json"
    models = [f"before={before}", *(f"{arm}={out / 'arms' / arm}" for arm in ARMS)]
    named = [word for model in models for word in ("--model", model)]
    stages.run("evaluate", "distill", "evaluate", "--cache", cache, *named, "--output_file", str(evaluation))

    print(f"\n{stages.table()}\n\ncache: {cache}\nmodel: {out / 'model'}\nevaluation: {evaluation}")
    scores = {name: row["bits_per_byte"] for name, row in json.loads(evaluation.read_text(encoding="utf8")).items()}
    if worse := [arm for arm in ARMS if scores[arm] >= scores["before"]]:
        sys.exit(f"error: {', '.join(worse)} did not get below `before` ({scores['before']:.3f} bits per byte)")


def flags(values: dict[str, Any]) -> list[str]:
    """`--name value` for every item."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


if __name__ == "__main__":
    main()

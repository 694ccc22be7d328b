"""What a look-ahead (`--look_ahead_steps`) costs, and how much its difference depends on the batches it happens to see.

    cache-builder build --teacher google/gemma-3-270m --corpus wikipedia.jsonl --output my-cache --max_documents 500
    python scripts/bench_look_ahead.py my-cache student --at 20 80 160 --draws 8

At each of the steps `--at` of one run it looks ahead `--draws` times from the same state, each time on batches of
another place of the stream. The spread over draws beside the error over documents is what the warning's threshold
stands on (`distill/look_ahead.py`). Cost: a look-ahead, a training step and an evaluation, in seconds of this process,
and on a GPU its peak memory before the first look-ahead and after the last. `--shuffled` gives the teacher's rows other
places of their documents: harm that should be seen. Appends a row for each step to scripts/results/look_ahead.csv.
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from proof_documents import View
from result_table import ResultTable
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed

from distill import CachedDistillationTrainer, CachedDocuments, DistillationConfig
from distill.held_out import held_out_figures
from distill.look_ahead import DIFFERENCE, ERROR, look_ahead
from distill.stream import Stream
from storage_specs import open_cache

RESULTS = Path(__file__).parent / "results" / "look_ahead.csv"


class Elsewhere:
    """A stream whose next batches are those of a later step."""

    def __init__(self, trainer: CachedDistillationTrainer, first: int) -> None:
        self.stream = Stream(trainer.train_dataset, trainer.batches, trainer.data_collator)
        self.first = first

    def peek(self, step: int, stop: int, steps: int) -> list[list[dict[str, Any]]]:
        found = self.stream.peek(self.first, self.first + steps, steps)
        self.stream.close()
        return found


class StepTimes(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(now() - self.began)


class Bench(CachedDistillationTrainer):
    """Evaluates at every step; that is, at some it looks ahead some times."""

    def prepare(self, at: Sequence[int], draws: int) -> None:
        self.at, self.draws, self.rows, self.times = at, draws, [], StepTimes()
        self.add_callback(self.times)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        step = self.state.global_step
        if step not in self.at:
            return {}
        began = now()
        evaluated = held_out_figures(self.model, self.processing_class, self.eval_dataset, self.args, self.accelerator)
        evaluation, before = now() - began, peak_gib()
        found, seconds, own = [], [], self.stream
        for draw in range(self.draws):
            self.stream = Elsewhere(self, step + (draw + 1) * 1000)
            began = now()
            found.append(look_ahead(self, self.eval_dataset))
            seconds.append(now() - began)
        self.stream = own
        differences = [each[DIFFERENCE] for each in found]
        spread, error = statistics.stdev(differences), statistics.mean(each[ERROR] for each in found)
        self.rows.append(
            {
                "at_step": step,
                "draws": self.draws,
                "held_out_documents": evaluated["documents"],
                "bits_per_byte": f"{evaluated['bits_per_byte']:.4f}",
                "difference": f"{statistics.mean(differences):.3g}",
                "spread_over_draws": f"{spread:.3g}",
                "error_over_documents": f"{error:.3g}",
                "spread_of_error": f"{spread / error:.2f}",
                "step_seconds": f"{statistics.median(self.times.seconds):.3g}",
                "evaluation_seconds": f"{evaluation:.3g}",
                "look_ahead_seconds": f"{statistics.median(seconds):.3g}",
                "peak_gib_before": before,
                "peak_gib": peak_gib(),
            }
        )
        print(self.rows[-1], flush=True)
        return evaluated


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gib() -> str:
    return f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if torch.cuda.is_available() else ""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("cache", type=Path)
    add("student", help="hub name or folder")
    add("--loss", nargs="+", default=["ce:1,mapped:1", "ce:1,uld:1.5"])
    add("--shuffled", action="store_true", help="the teacher's rows at other places of their documents")
    add("--learning_rate", type=float, default=1e-3, help="constant (1e-3)")
    add("--look_ahead_steps", type=int, default=4)
    add("--at", type=int, nargs="+", default=[20, 80, 160])
    add("--draws", type=int, default=8)
    add("--per_device_train_batch_size", type=int, default=8)
    add("--max_length", type=int, default=256)
    add("--results", type=Path, default=RESULTS, help="CSV to append to")
    options = parser.parse_args(arguments)
    cuda, table, rows = torch.cuda.is_available(), ResultTable(options.results), []
    for loss in options.loss:
        cache = open_cache(options.cache, True)
        view = View(cache, cache.manifest.k_ids, shuffled=options.shuffled)
        set_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            config = DistillationConfig(
                output_dir=folder,
                loss=loss,
                learning_rate=options.learning_rate,
                lr_scheduler_type="constant",
                look_ahead_steps=options.look_ahead_steps,
                max_steps=max(options.at) + 1,
                per_device_train_batch_size=options.per_device_train_batch_size,
                max_length=options.max_length,
                eval_strategy="steps",
                eval_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                bf16=cuda,
                use_cpu=not cuda,
            )
            model = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32)
            bench = Bench(model, config, CachedDocuments(view), AutoTokenizer.from_pretrained(options.student))
            bench.prepare(options.at, options.draws)
            bench.train()
        settings = {
            "teacher": cache.manifest.teacher["name"],
            "documents": len(cache),
            "loss": loss,
            "rows": "shuffled" if options.shuffled else "teacher's",
            "learning_rate": f"{options.learning_rate:g}",
            "look_ahead_steps": options.look_ahead_steps,
            "batch": options.per_device_train_batch_size,
            "max_length": options.max_length,
            "parameters": model.num_parameters(),
        }
        versions = {
            "machine": torch.cuda.get_device_name() if cuda else f"CPU {platform.machine()}",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
        }
        rows += [settings | row | versions for row in bench.rows]
        table.write(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Does distillation from a cache pay? A resumable grid of training runs, one row of scripts/results/proof.csv each.

    python scripts/proof.py --list                        # every cell: measured, not measured, predicted seconds
    python scripts/proof.py --core --workers 4 --budget_seconds 500   # measure what is missing, in order, if it fits
    python scripts/proof.py --scale cpu --tasks wikipedia --arms ce mapped --seeds 0
    python scripts/proof.py --scale tiny --tasks wikipedia --seeds 0   # does it run?

A cell is one student trained by `CachedDistillationTrainer` (proof_grid.py says which there are, proof_stages.py what
they need first). A row is appended when its cell is finished, so a killed cell leaves none; the same command goes on.
Several processes (`--workers`, or the command given several times) share the GPUs that they see, of which one process
would not fill even one: each takes cells that nobody else has under way. They take turns on a GPU unless NVIDIA's
multi-process service runs (`nvidia-cuda-mps-control -d`, before the command). The tables of distill/README.md come from
the rows (proof_table.py). Where `--teacher` and `--student` are not given they are Gemma-3-270M and
SmolLM2-135M-Instruct (demo_assets.py).
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from proof_grid import ARMS, BLOCKS, KEY, RATES, SCALES, Block, Cell, Row, cells_of
from proof_rows import append_row, claim, done_keys, lock_file
from result_table import read_rows

RESULTS = Path(__file__).parent / "results" / "proof.csv"
# Seconds of a cell before one like it was measured: what its steps, and the rest, take there.
GUESS = {"gpu": (0.06, 12.0), "cpu": (2.0, 60.0), "tiny": (0.2, 2.0)}
PATIENCE = 2.0  # seconds between two looks at what others have finished


def chosen_blocks(options: argparse.Namespace) -> list[Block]:
    """The blocks that the flags leave."""
    of_scale = SCALES[options.scale]
    return [
        block
        for block in BLOCKS
        if block.task in (options.tasks or of_scale)
        and block.task in of_scale
        and (options.students is None or block.student in options.students)
        and (block.core or not options.core)
    ]


def chosen_cells(options: argparse.Namespace, rows: Sequence[Row]) -> list[Cell]:
    """The cells that the flags leave, in order, each once."""
    cells = {}
    for block in chosen_blocks(options):
        for cell in cells_of(block, options.scale, rows):
            if (
                cell.arm in (options.arms or ARMS)
                and cell.seed in (options.seeds or (cell.seed,))
                and (cell.learning_rate in (options.rates or (cell.learning_rate,)))
            ):
                cells.setdefault(cell.key, cell)
    return list(cells.values())


def predicted_seconds(cell: Cell, rows: Sequence[Row]) -> float:
    """The median of like cells, step by step; before there are any, a guess."""
    like = [row for row in rows if all(row[name] == getattr(cell, name) for name in ("scale", "task", "student"))]
    if like:
        return cell.training.steps * statistics.median(float(row["seconds"]) / float(row["steps"]) for row in like)
    step, rest = GUESS[cell.scale]
    return cell.training.steps * step + rest


def measure_cells(
    options: argparse.Namespace, measure: Callable[[Cell], dict[str, Any]], say: Callable[[str], None]
) -> bool:
    """Measure chosen cells one after the other until none is left to start, or the budget forbids it.

    A cell that fails is said and passed over, and leaves no row. Returns whether none failed.
    """
    ends, measured = time.monotonic() + options.budget_seconds, 0
    failed: set[tuple[str, ...]] = set()
    while measured < options.max_cells:
        rows = read_rows(options.results)
        missing = [cell for cell in chosen_cells(options, rows) if cell.key not in done_keys(rows) | failed]
        known = [cell for cell in missing if cell.learning_rate is not None]
        fitting = [cell for cell in known if time.monotonic() + predicted_seconds(cell, rows) <= ends]
        taken = None
        for cell in fitting:
            taken = claim(lock_file(options.work / options.scale, "cell-" + "-".join(cell.key)))
            if taken is not None:
                break
        if taken is None:
            # What others have under way may yet tell the rate of cells that wait for it.
            if fitting and len(known) < len(missing):
                time.sleep(PATIENCE)
                continue
            break
        with taken:
            if cell.key in done_keys(read_rows(options.results)):  # finished between the look and the claim
                continue
            say(f"{cell}: ...")
            try:
                row = dict(zip(KEY, cell.key, strict=True)) | measure(cell)
            except Exception as error:  # the cells behind it shall not be lost with it
                failed.add(cell.key)
                say(f"{cell}: FAILED: {type(error).__name__}: {error}")
                continue
            append_row(options.results, row)
            measured += 1
            score = f", {row['metric']} {row['score']:.1f}" if row["metric"] else ""
            say(f"{cell}: {row['bits_per_byte']:.4f} bits per byte ({row['seconds']:.0f} s){score}")
    return not failed


def listing(options: argparse.Namespace) -> str:
    """Every chosen cell and its state, and what is left in seconds."""
    rows = read_rows(options.results)
    measured = {tuple(row[name] for name in KEY): row for row in rows}
    lines, seconds, waiting = [], 0.0, 0
    cells = chosen_cells(options, rows)
    for cell in cells:
        if row := measured.get(cell.key):
            lines.append(f"measured      {float(row['bits_per_byte']):8.4f}  {cell}")
        else:
            predicted = predicted_seconds(cell, rows)
            seconds, waiting = seconds + predicted, waiting + (cell.learning_rate is None)
            lines.append(f"not measured  {predicted:6.0f} s  {cell}")
    missing = sum(cell.key not in measured for cell in cells)
    lines.append(
        f"{len(cells) - missing} cells measured, {missing} not measured (about {seconds:.0f} s; {waiting} of them wait "
        "for the best rate of others)"
    )
    return "\n".join(lines)


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--list", action="store_true", help="print the cells and their state, and measure nothing")
    add("--scale", choices=SCALES, help="how much of everything (default: gpu where there is one, else cpu)")
    add("--core", action="store_true", help="only the cells that matter most")
    add("--tasks", nargs="+", metavar="T", choices=SCALES["gpu"], help=f"of {', '.join(SCALES['gpu'])} (all)")
    add("--students", nargs="+", metavar="S", choices=RATES, help=f"of {', '.join(RATES)} (all)")
    add("--arms", nargs="+", metavar="A", choices=ARMS, help=f"of {', '.join(ARMS)} (all)")
    add("--seeds", nargs="+", type=int, metavar="N", help="(all)")
    add("--rates", nargs="+", type=float, metavar="R", help="learning rates (all)")
    add("--budget_seconds", type=float, default=float("inf"), metavar="S", help="start no cell that would end later")
    add("--max_cells", type=int, default=sys.maxsize, metavar="N", help="measure at most so many (all)")
    add("--workers", type=int, default=1, metavar="N", help="processes that share the work (1)")
    add("--prepare", action="store_true", help="make what the cells need, and measure nothing")
    add("--work", type=Path, default=Path("runs/proof"), help="models, caches (default: runs/proof)")
    add("--results", type=Path, default=RESULTS, help="the CSV (default: scripts/results/proof.csv)")
    add("--teacher", help="a model folder (default: Gemma-3-270M from packages)")
    add("--student", help="a model folder (default: SmolLM2-135M-Instruct from packages)")
    options = parser.parse_args(words)
    if options.scale is None:
        import torch

        options.scale = "gpu" if torch.cuda.is_available() else "cpu"
    return options


def prepare(options: argparse.Namespace, stages: Any, say: Callable[[str], None]) -> None:
    """Make what the missing cells need, in their order, as far as the budget would bring one process."""
    rows, seconds, ready = read_rows(options.results), 0.0, set()
    for cell in chosen_cells(options, rows):
        if cell.key in done_keys(rows):
            continue
        needs = (cell.task, cell.student, cell.answers)
        if needs not in ready:
            stages.cache_path(cell.task, cell.answers)
            stages.student_path(cell.student)
            ready.add(needs)
            say(f"{cell.task} with {cell.answers} answers, {cell.student}: ready")
        seconds += predicted_seconds(cell, rows)
        if seconds > options.budget_seconds:
            return


def visible_gpus() -> list[str]:
    """The GPUs that processes started from here may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def run_workers(count: int, budget_seconds: float, words: list[str]) -> int:
    """The same command in `count` processes, and one more that makes, ahead of them, what cells to come will need.

    Each has one of the GPUs, in turn.
    """
    command = [sys.executable, __file__, *words, "--workers", "1"]  # the last of two flags counts
    ahead = ["--prepare", "--budget_seconds", str(count * budget_seconds)]
    gpus = visible_gpus() or [""]
    processes = [
        subprocess.Popen([*command, *more], env=os.environ | {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]})
        for number, more in enumerate((ahead, *[[]] * count))
    ]
    try:
        return max(process.wait() for process in processes)
    except KeyboardInterrupt:  # they got it, too
        return max(abs(process.wait()) for process in processes)


def main(words: Sequence[str] | None = None) -> None:
    options = arguments(words)
    if options.list:
        print(listing(options))
        return
    if options.workers > 1:
        given = sys.argv[1:] if words is None else list(words)
        sys.exit(run_workers(options.workers, options.budget_seconds, given))
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{os.getpid()} {time.monotonic() - began:5.0f} s] {line}", file=sys.stderr, flush=True)

    import transformers
    from proof_cell import Laboratory, measure
    from proof_stages import Stages

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    laboratory = Laboratory(
        Stages(work=options.work, scale=options.scale, teacher=options.teacher, student=options.student)
    )
    if options.prepare:
        prepare(options, laboratory.stages, say)
        return
    well = measure_cells(options, lambda cell: measure(laboratory, cell), say)
    print(listing(options).splitlines()[-1])
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()

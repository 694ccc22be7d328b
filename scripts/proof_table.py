"""Print what scripts/results/proof.csv says as the tables of distill/README.md, including where nothing is gained.

python scripts/proof_table.py            # print them
python scripts/proof_table.py --write    # put them into distill/README.md (tests hold the two equal)

An arm's figure is the mean over seeds at its own best learning rate, chosen on validation documents; its spread is the
standard deviation over seeds. A gain counts where it exceeds twice the larger spread of the two that are compared.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from proof import RESULTS
from proof_grid import ARMS, BLOCKS, DEFAULT_K_IDS, KEY, SCALES, VARIED, Block, Cell, Row, cells_of, rates_to_try
from proof_rows import done_keys
from result_table import read_rows

README = Path(__file__).parents[1] / "distill" / "README.md"
BEGIN, END = "<!-- proof -->\n", "\n<!-- /proof -->"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One arm of a block: the rows of its seeds at its best rate; the rates that were tried, ascending, and how many
    shall be; the row of another rate that is best on the documents that are reported, which choose nothing."""

    arm: str
    rows: Sequence[Row]
    rates: Sequence[float]
    rates_to_try: int
    hindsight: Row | None

    def column(self, name: str) -> list[float]:
        return [float(row[name]) for row in self.rows]

    @property
    def bits(self) -> float:
        return statistics.mean(self.column("bits_per_byte"))

    @property
    def validation(self) -> float:
        return statistics.mean(self.column("validation_bits_per_byte"))

    @property
    def spread(self) -> float:
        bits = self.column("bits_per_byte")
        return statistics.stdev(bits) if len(bits) > 1 else math.nan


def figures_of(block: Block, scale: str, rows: Sequence[Row]) -> list[Figure]:
    """The measured arms of a block, in its order. Rates that have not been tried yet are not waited for."""
    found = []
    varied = {name: getattr(block, name) for name in VARIED}
    for arm in block.arms:
        names = Cell(scale=scale, arm=arm, learning_rate=None, seed=0, **varied)
        same = dict(zip(KEY, names.key, strict=True))
        of_arm = [
            row for row in rows if all(row[name] == same[name] for name in KEY if name not in ("learning_rate", "seed"))
        ]
        choosing = [row for row in of_arm if not block.tuned or row["seed"] == str(block.seeds[0])]
        if choosing:
            best = min(choosing, key=lambda row: float(row["validation_bits_per_byte"]))["learning_rate"]
            at_best = [row for row in of_arm if row["learning_rate"] == best]
            rates = sorted({float(row["learning_rate"]) for row in choosing})
            on_test = min(choosing, key=lambda row: float(row["bits_per_byte"]))
            found.append(
                Figure(
                    arm=arm,
                    rows=sorted(at_best, key=lambda row: int(row["seed"])),
                    rates=rates,
                    rates_to_try=len(rates_to_try(block, scale, arm, rows)),
                    hindsight=None if on_test["learning_rate"] == best else on_test,
                )
            )
    return found


def block_table(block: Block, scale: str, rows: Sequence[Row]) -> str | None:
    """One table with its caption and verdict; None before there are two arms to compare."""
    figures = figures_of(block, scale, rows)
    if len(figures) < 2:
        return None
    first = figures[0].rows[0]
    teacher, untrained = float(first["teacher_bits_per_byte"]), float(first["untrained_bits_per_byte"])
    metric = first["metric"]
    head = ["loss", "rate", "seeds", "bits per byte", "gain on CE", "of the gap to the teacher"]
    head += [metric.replace("_", " ")] if metric else []
    lines = [caption(block, first), "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    ce = next((figure for figure in figures if figure.arm == "ce"), None)
    for figure in figures:
        cells = [f"{figure.arm} (`{ARMS[figure.arm].loss}`)", rate_text(figure, block), str(len(figure.rows))]
        cells.append(f"{figure.bits:.4f}" + ("" if math.isnan(figure.spread) else f" ± {figure.spread:.4f}"))
        gain = ce.bits - figure.bits if ce is not None and figure is not ce else math.nan
        shown = f"{gain:+.4f}"
        cells.append("" if math.isnan(gain) else f"**{shown}**" if counts(gain, figure, ce) else shown)
        cells.append("" if math.isnan(gain) else f"{gain / (ce.bits - teacher):+.0%}")
        if metric:
            cells.append(f"{statistics.mean(figure.column('score')):.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    scores = f", {metric.replace('_', ' ')} {float(first['teacher_score']):.1f}" if metric else ""
    scores_untrained = f", {float(first['untrained_score']):.1f}" if metric else ""
    lines += ["", f"Teacher {teacher:.4f}{scores}; untrained student {untrained:.4f}{scores_untrained}."]
    if ce is not None:
        lines.append(verdict(figures, ce) + hindsight(ce))
    return "\n".join(lines)


def caption(block: Block, row: Row) -> str:
    """What was trained on what."""
    answers = ", answers written by the teacher" if block.answers == "teacher" else ""
    share = f", {block.fraction:.0%} of the documents" if block.fraction != 1 else ""
    epochs = int(row["steps"]) * int(row["batch"]) / int(row["train_documents"])
    return (
        f"**{block.task}, {block.student}{answers}{share}**: {row['steps']} steps of {row['batch']} documents out of "
        f"{row['train_documents']} ({epochs:.1f} epochs); {row['test_documents']} test documents "
        f"({int(row['test_bytes']):,} bytes); ids of {block.k_ids} ranks; {row['machine']}."
    )


def rate_text(figure: Figure, block: Block) -> str:
    """The best rate; marked where a better one may lie beyond those tried, or not all were."""
    rate, tried = float(figure.rows[0]["learning_rate"]), figure.rates
    if figure.rates_to_try == 1:
        return f"{rate:g} (not tuned)"
    if not block.tuned:
        return f"{rate:g}"
    said = [f"{len(tried)} of {figure.rates_to_try} tried"] if len(tried) < figure.rates_to_try else []
    if len(tried) > 1 and rate in (tried[0], tried[-1]):
        said.append("the end of them" if said else "the end")
    return f"{rate:g}" + (f" ({', '.join(said)})" if said else "")


def counts(gain: float, figure: Figure, ce: Figure) -> bool:
    """Whether a difference exceeds twice the larger spread; never on one seed."""
    return abs(gain) > 2 * max(figure.spread, ce.spread) if len(figure.rows) > 1 and len(ce.rows) > 1 else False


def verdict(figures: Sequence[Figure], ce: Figure) -> str:
    """One sentence: which arms beat CE, which lose, and of which seeds say neither."""
    gained, lost, open_ = [], [], []
    for figure in figures:
        if figure is ce:
            continue
        gain = ce.bits - figure.bits
        (open_ if not counts(gain, figure, ce) else gained if gain > 0 else lost).append(figure.arm)
    parts = [("Better than CE", gained), ("Worse than CE", lost), ("Neither, or too few seeds to say", open_)]
    return " ".join(f"{what}: {', '.join(arms)}." for what, arms in parts if arms)


def hindsight(ce: Figure) -> str:
    """What CE would have had at a rate that its validation documents did not choose, on the first seed."""
    row, chosen = ce.hindsight, ce.rows[0]
    if row is None:
        return ""
    return (
        f" At {float(row['learning_rate']):g}, which validation did not choose, ce had {_result(row)} on seed "
        f"{row['seed']} (at the rate that it chose {_result(chosen)})."
    )


def _result(row: Row) -> str:
    score = f", {row['metric'].replace('_', ' ')} {float(row['score']):.1f}" if row["metric"] else ""
    return f"{float(row['bits_per_byte']):.4f}{score}"


def whatever_the_steps(scale: str, rows: Sequence[Row]) -> str | None:
    """CE and the best other loss of the core's text and student, each at its own best number of steps of those that
    were run, by validation; of more than one seed."""
    core = core_of("wikipedia")
    same = [
        block
        for block in merged(BLOCKS)
        if all(getattr(block, name) == getattr(core, name) for name in ("task", "student", "answers", "fraction"))
    ]
    figures = [(figure, block) for block in same for figure in figures_of(block, scale, rows) if len(figure.rows) > 1]
    of_ce = [one for one in figures if one[0].arm == "ce"]
    others = [one for one in figures if one[0].arm != "ce"]
    if len({figure.rows[0]["steps"] for figure, _ in of_ce}) < 2 or not others:
        return None
    (ce, _), (best, block) = (min(some, key=lambda one: one[0].validation) for some in (of_ce, others))
    gain, teacher = ce.bits - best.bits, float(ce.rows[0]["teacher_bits_per_byte"])
    ids = f" with ids of {block.k_ids} ranks" if block.k_ids != DEFAULT_K_IDS else ""
    return (
        f"**{core.task}, {core.student}, each loss at the better of the numbers of steps that were run**: ce "
        f"{ce.bits:.4f} ± {ce.spread:.4f} after {ce.rows[0]['steps']}, {best.arm}{ids} {best.bits:.4f} ± "
        f"{best.spread:.4f} after {best.rows[0]['steps']}: {gain:+.4f}, {gain / (ce.bits - teacher):+.0%} of the gap "
        "to the teacher."
    )


def core_of(task: str) -> Block:
    return next(block for block in BLOCKS if block.task == task and block.core)


def k_ids_table(scale: str, rows: Sequence[Row]) -> str | None:
    """Bits per byte gained on CE against bytes per row, for each number of ids."""
    main = core_of("wikipedia")
    ce = next((figure for figure in figures_of(main, scale, rows) if figure.arm == "ce"), None)
    varied = [block for block in BLOCKS if block.k_ids != DEFAULT_K_IDS and block.longer == main.longer]
    arms = dict.fromkeys(arm for block in varied for arm in block.arms)
    blocks = sorted([*varied, replace(main, arms=tuple(arms))], key=lambda block: block.k_ids)
    found = [(block.k_ids, figure) for block in blocks for figure in figures_of(block, scale, rows)]
    if ce is None or len(found) < 2:
        return None
    lines = ["**How many ids are worth their bytes** (wikipedia):", ""]
    lines += ["| loss | k_ids | bytes a row, text and all | seeds | bits per byte | gain on CE |", "|---" * 6 + "|"]
    for k_ids, figure in sorted(found, key=lambda one: list(arms).index(one[1].arm)):
        size = float(figure.rows[0]["bytes_per_row"])
        seeds = {row["seed"] for row in figure.rows} & {row["seed"] for row in ce.rows}
        bits, ce_bits = (
            statistics.mean(float(row["bits_per_byte"]) for row in one.rows if row["seed"] in seeds)
            for one in (figure, ce)
        )
        shown = [figure.arm, str(k_ids), f"{size:.1f}", str(len(seeds)), f"{bits:.4f}", f"{ce_bits - bits:+.4f}"]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def merged(blocks: Sequence[Block]) -> list[Block]:
    """Blocks that differ only in their arms, and in when they are measured, as one; what matters most first."""
    found: dict[tuple, Block] = {}
    for block in blocks:
        key = tuple(getattr(block, name) for name in VARIED)
        before = found.get(key, replace(block, arms=()))
        found[key] = replace(before, arms=tuple(dict.fromkeys((*before.arms, *block.arms))))
    return sorted(found.values(), key=lambda block: not block.core)


def tables(rows: Sequence[Row]) -> str:
    """All of it, as Markdown."""
    parts = []
    for scale in ("gpu", "cpu"):
        found = [block_table(block, scale, rows) for block in merged(BLOCKS) if block.k_ids == DEFAULT_K_IDS]
        found += [whatever_the_steps(scale, rows), k_ids_table(scale, rows)]
        cells = {cell.key for block in BLOCKS if block.task in SCALES[scale] for cell in cells_of(block, scale, rows)}
        measured, final = sum(row["scale"] == scale for row in rows), len(cells & done_keys(rows))
        if scale == "gpu":
            parts.append(
                f"On one GPU {final} of the grid's {len(cells)} cells are measured, and {measured - final} at rates "
                "that more rates may yet change or already did; the others are not."
            )
        else:
            parts.append(f"On a CPU {measured} cells are measured, small ones, to see which way they point.")
        parts += [table for table in found if table is not None]
    return "\n\n".join(parts)


def written_into(text: str, rows: Sequence[Row]) -> str:
    """The README's text with the tables between its markers."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + tables(rows) + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put them into distill/README.md")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV")
    options = parser.parse_args()
    rows = read_rows(options.results)
    if not options.write:
        print(tables(rows))
        return
    README.write_text(written_into(README.read_text(encoding="utf8"), rows), encoding="utf8")


if __name__ == "__main__":
    main()

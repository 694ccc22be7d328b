"""How wrong is a loss from a cached row? Against the full sorted sum, over k, on the real pair, value and gradient.

    python scripts/plot_loss_error.py                 # about two minutes on two cores
    python scripts/plot_loss_error.py --passages 1 --tokens 40 --output_folder /tmp   # a few seconds

Writes loss_error.csv and loss_error.svg. Models and text: scripts/demo_assets.py. Choices compared, p and q sorted:
    head           sum_{i<=k} |p_i - q_i|
    renormalised   the same, both heads divided by their sums
    head + tail    head + |T - S|, what `uld_loss` computes
    sketch         head and 16 log-spaced bin masses of the tail, what `uld_loss` computes with `rank_edges`
"""

import argparse
import csv
import math
from collections.abc import Callable
from pathlib import Path

import torch
from real_pair import RealPair, passages

from distill.losses import uld_loss
from storage_specs.sketch import bin_masses, log_rank_edges

RANKS = (4, 8, 16, 32, 64, 128, 256)
BINS = 16
FIELDS = ("choice", "k", "rows", "mean_full", "mean_abs_error", "max_abs_error", "mean_gradient_cosine")
COLOURS = {"head": "#c0392b", "renormalised": "#d68910", "head + tail": "#1f618d", "sketch": "#1e8449"}


def full(logits_NV: torch.Tensor, sorted_NU: torch.Tensor) -> torch.Tensor:
    q_NV = logits_NV.softmax(1).sort(dim=1, descending=True).values
    missing = sorted_NU.shape[1] - q_NV.shape[1]
    return (torch.nn.functional.pad(q_NV, (0, missing)) - sorted_NU).abs().sum(1)


def choices(sorted_NU: torch.Tensor, k: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    probs_NK, tail_N = sorted_NU[:, :k], sorted_NU[:, k:].sum(1)
    edges = log_rank_edges(k, sorted_NU.shape[1], BINS)
    sketch = {
        "teacher_bins_NJ": torch.from_numpy(bin_masses(sorted_NU.numpy(), edges)),
        "rank_edges": torch.from_numpy(edges),
    }

    def head(logits_NV: torch.Tensor, renormalise: bool) -> torch.Tensor:
        q_NK, p_NK = logits_NV.softmax(1).topk(k, dim=1).values, probs_NK
        if renormalise:
            q_NK, p_NK = (x_NK / x_NK.sum(1, keepdim=True) for x_NK in (q_NK, p_NK))
        return (p_NK - q_NK).abs().sum(1)

    return {
        "head": lambda logits_NV: head(logits_NV, False),
        "renormalised": lambda logits_NV: head(logits_NV, True),
        "head + tail": lambda logits_NV: uld_loss(logits_NV, probs_NK, tail_N, reduction="none"),
        "sketch": lambda logits_NV: uld_loss(logits_NV, probs_NK, tail_N, reduction="none", **sketch),
    }


def with_gradient(
    loss: Callable[[torch.Tensor], torch.Tensor], logits_NV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf_NV = logits_NV.clone().requires_grad_()
    loss_N = loss(leaf_NV)
    return loss_N.detach(), torch.autograd.grad(loss_N.sum(), leaf_NV)[0]


def measure(passage_count: int, tokens: int) -> list[dict[str, object]]:
    found: dict[tuple[str, int], list[torch.Tensor]] = {}
    for teacher_NU, student_NV in RealPair().compared(passages(passage_count), tokens):
        sorted_NU = teacher_NU.double().softmax(1).sort(dim=1, descending=True).values
        logits_NV = student_NV.double()
        exact_N, exact_NV = with_gradient(lambda z_NV: full(z_NV, sorted_NU), logits_NV)  # noqa: B023
        for k in RANKS:
            for name, loss in choices(sorted_NU, k).items():
                loss_N, gradient_NV = with_gradient(loss, logits_NV)
                cosine_N = torch.cosine_similarity(gradient_NV, exact_NV)
                found.setdefault((name, k), []).append(torch.stack([exact_N, (loss_N - exact_N).abs(), cosine_N]))
        print(f"{len(exact_N)} rows, full ULD {exact_N.mean():.4f}", flush=True)
    rows = []
    for (name, k), parts in found.items():
        exact_N, error_N, cosine_N = torch.cat(parts, 1)
        figures = (exact_N.mean(), error_N.mean(), error_N.max(), cosine_N.mean())
        rows.append(dict(zip(FIELDS, (name, k, len(exact_N), *(f"{x:.6g}" for x in figures)), strict=True)))
    return sorted(rows, key=lambda row: list(COLOURS).index(str(row["choice"])))


def draw(rows: list[dict[str, object]]) -> str:
    """An SVG of mean absolute error over k, both axes logarithmic."""
    width, height, left, bottom, right, top = 640, 400, 70, 50, 130, 40
    errors = [float(row["mean_abs_error"]) for row in rows]
    low, high = math.floor(math.log10(min(errors))), math.ceil(math.log10(max(errors)))

    def x(k: float) -> float:
        return left + (math.log(k / RANKS[0]) / math.log(RANKS[-1] / RANKS[0])) * (width - left - right)

    def y(error: float) -> float:
        return top + (high - math.log10(error)) / (high - low) * (height - top - bottom)

    def text(at_x: float, at_y: float, words: str, more: str = "") -> str:
        return f'<text x="{at_x:.1f}" y="{at_y:.1f}" {more}>{words}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        text(left, 20, "Mean absolute error of ULD from a cached row, Gemma-3-270M to SmolLM2-135M", 'font-size="13"'),
        text((left + width - right) / 2, height - 12, "k, cached ranks", 'text-anchor="middle"'),
    ]
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<line x1="{left}" y1="{at:.1f}" x2="{width - right}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(text(left - 8, at + 4, f"{10.0**power:g}", 'text-anchor="end"'))
    for k in RANKS:
        parts.append(text(x(k), height - bottom + 18, str(k), 'text-anchor="middle"'))
    for name, colour in COLOURS.items():
        points = [(x(int(row["k"])), y(float(row["mean_abs_error"]))) for row in rows if row["choice"] == name]
        line = " ".join(f"{at_x:.1f},{at_y:.1f}" for at_x, at_y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="3" fill="{colour}"/>' for at_x, at_y in points]
        parts.append(text(points[-1][0] + 10, points[-1][1] + 4, name, f'fill="{colour}"'))
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96, help="tokens of each passage that a model reads")
    parser.add_argument("--output_folder", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    rows = measure(options.passages, options.tokens)
    options.output_folder.mkdir(parents=True, exist_ok=True)
    with (options.output_folder / "loss_error.csv").open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (options.output_folder / "loss_error.svg").write_text(draw(rows), encoding="utf8")
    for row in rows:
        print(*(f"{row[name]!s:>14s}" for name in FIELDS))


if __name__ == "__main__":
    main()

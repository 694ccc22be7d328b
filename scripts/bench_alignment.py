"""How fast rows are paired: tokens per second of one core, for every mode.

    python scripts/bench_alignment.py [--output scripts/results/alignment.csv]

Tokenisations of real Wikipedia passages by Gemma (teacher) and SmolLM2 (student), joined to documents of three lengths;
only `align` is timed, one window per document, and both sides' tokens count.
"""

import argparse
import csv
import json
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("RAYON_NUM_THREADS", "1")

import demo_assets
import numpy as np
from tokenizers import Tokenizer

from distill.alignment import MODES, align, align_groups
from storage_specs import CachedDocument, cut_windows, render, text_document
from storage_specs.windows import Window

BYTES = (2_000, 20_000, 2_000_000)
REPEATS = 7


def cached_rows(window: Window, text: str) -> CachedDocument:
    """A document with rows at a window's coordinates, and no values worth looking at."""
    document = text_document(text)
    rows = len(window.segment)
    return CachedDocument(
        kind=document.kind,
        text=text,
        messages=document.messages,
        segment=window.segment,
        byte_start=window.byte_start,
        byte_end=window.byte_end,
        is_end=window.is_end,
        gold_logprob=np.zeros(rows, np.float32),
        tail_mass=np.zeros(rows, np.float32),
        probs=np.zeros((rows, 1), np.float32),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "alignment.csv")
    output = parser.parse_args().output
    with demo_assets.wikipedia_path().open(encoding="utf8") as lines:
        text = "\n".join(json.loads(line)["text"] for _, line in zip(range(6_000), lines, strict=False))
    teacher, student = (
        Tokenizer.from_file(str(path / "tokenizer.json"))
        for path in (demo_assets.gemma_path(), demo_assets.smollm2_path())
    )
    measured = []
    for size in BYTES:
        piece = text.encode()[:size].decode(errors="ignore")
        (theirs,) = cut_windows(render(teacher, text_document(piece)), 10**9, 1)
        (window,) = cut_windows(render(student, text_document(piece)), 10**9, 1)
        document = cached_rows(theirs, piece)
        tokens = len(window.segment) + len(document.segment)
        for mode in MODES:
            seconds = []
            for _ in range(REPEATS * max(1, 20_000 // size)):
                started = time.perf_counter()
                align_groups(document, window) if mode == "merge" else align(document, window, mode)
                seconds.append(time.perf_counter() - started)
            measured.append(
                {
                    "mode": mode,
                    "document_bytes": len(piece.encode()),
                    "tokens": tokens,
                    "tokens_per_second_p50": round(tokens / float(np.median(seconds))),
                    "tokens_per_second_p10": round(tokens / float(np.quantile(seconds, 0.9))),
                    "pairs": len(align(document, window, mode)[0]),
                    "machine": f"{platform.machine()}, 1 core",
                    "python": platform.python_version(),
                    "numpy": np.__version__,
                }
            )
            print(measured[-1])
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, fieldnames=list(measured[0]))
        writer.writeheader()
        writer.writerows(measured)


if __name__ == "__main__":
    main()

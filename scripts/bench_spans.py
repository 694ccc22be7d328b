"""How fast byte spans are found beyond the tokenizer's own time: megabytes of text per second of one core.

    python scripts/bench_spans.py [--output scripts/results/spans.csv]

Real Wikipedia passages in documents of some 2,000 bytes, through `storage_specs.encode`; subtracted is what the same
tokenizer's own `encode_batch` with offsets takes on the same texts. English needs few detours, French more; T5, BERT
and CLIP alter every text, so their spans come from offsets.
"""

import argparse
import csv
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("RAYON_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import demo_assets
import numpy as np
import tokenizer_assets
import tokenizers
from alignment_matrix import documents, texts
from tokenizers import Tokenizer

from storage_specs import encode

REPEATS = 5


def seconds(work: Callable[[], object]) -> float:
    """The median over repeats."""
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=200_000, help="bytes of each kind of text")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "spans.csv")
    arguments = parser.parse_args()
    paths = {"gemma": demo_assets.gemma_path(), "smollm2": demo_assets.smollm2_path()}
    measured = []
    for name in (*paths, *tokenizer_assets.NAMES):
        tokenizer = (
            Tokenizer.from_file(str(paths[name] / "tokenizer.json")) if name in paths else tokenizer_assets.load(name)
        )
        for kind in ("English", "French", "code"):
            pieces = list(documents(texts()[kind], arguments.bytes))
            size = sum(len(piece.encode()) for piece in pieces) / 1e6
            encode(tokenizer, pieces[:1])  # the token table, made once per tokenizer
            own = seconds(lambda pieces=pieces, tokenizer=tokenizer: tokenizer.encode_batch(pieces))
            whole = seconds(lambda pieces=pieces, tokenizer=tokenizer: encode(tokenizer, pieces))
            beyond = max(whole - own, 1e-9)
            measured.append(
                {
                    "tokenizer": name,
                    "text": kind,
                    "megabytes": round(size, 3),
                    "tokenizer_mb_per_second": round(size / own, 2),
                    "with_spans_mb_per_second": round(size / whole, 2),
                    "beyond_tokenizer_mb_per_second": round(size / beyond, 2) if whole > own else "faster",
                    "machine": f"{platform.machine()}, 1 core",
                    "tokenizers": tokenizers.__version__,
                }
            )
            print(*measured[-1].values(), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, fieldnames=list(measured[0]))
        writer.writeheader()
        writer.writerows(measured)


if __name__ == "__main__":
    main()

"""Byte spans of every tokenizer against Hypothesis: nothing out of order, nothing twice, nothing lost, nowhere.

    python scripts/nightly_spans.py                          # 100,000 examples over ten tokenizers
    python scripts/nightly_spans.py --examples 5000 --seed 3

What is checked is `check` of tests/storage_specs/test_encoding.py. Prints the examples really run and exits with 1 on
a failure, naming tokenizer and text.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("RAYON_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "storage_specs"))

import demo_assets
import tokenizer_assets
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from nasty_strings import NASTY
from test_encoding import LOSSLESS, LOSSY, MARKS, UNICODE, check
from tokenizers import Tokenizer

PIECES = st.lists(st.sampled_from(NASTY) | UNICODE, max_size=4).map(" ".join)


def run(name: str, tokenizer: Tokenizer, examples: int, seed_number: int) -> int:
    """How many texts were checked; raises what `check` raises."""
    done = 0

    @seed(seed_number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(text=UNICODE | MARKS | PIECES)
    def every_text(text: str) -> None:
        nonlocal done
        done += 1
        check(name, tokenizer, text)

    every_text()
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100_000, help="over all tokenizers")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    paths = {"gemma": demo_assets.gemma_path(), "smollm2": demo_assets.smollm2_path()}
    names, total, failures = LOSSLESS + LOSSY, 0, 0
    for name in names:
        started = time.perf_counter()
        tokenizer = (
            Tokenizer.from_file(str(paths[name] / "tokenizer.json")) if name in paths else tokenizer_assets.load(name)
        )
        try:
            done = run(name, tokenizer, -(-arguments.examples // len(names)), arguments.seed)
        except Exception as error:
            failures += 1
            print(f"{name}: FAILED: {type(error).__name__}: {error}\n{getattr(error, '__notes__', '')}", flush=True)
            continue
        total += done
        print(f"{name}: {done:,} examples, 0 failures, {time.perf_counter() - started:.0f} s", flush=True)
    print(f"{total:,} examples over {len(names)} tokenizers, {failures} tokenizers with a failure")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()

"""What it takes to hand a shard's rows to a process that encodes: through a pipe, and in memory that both map.

    PYTHONPATH=. python scripts/bench_parcels.py --k 64 256

Shards of four documents of 2,048 tokens, like a language model's rows; two processes that only look at every array, of
which one works at a time, as one pipe serves them all. Ways take turns; milliseconds a shard from submission to answer.
A row per way and k goes to scripts/results/parcels.csv.
"""

import argparse
import os
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from bench_capture import RandomPrompts
from bench_client import fake_rows
from result_table import ResultTable

from cache_builder.engines.base import EngineConfig
from cache_builder.engines.vllm import captured_scores
from cache_builder.parcels import Parcel, parcel
from cache_builder.rows import cached_document
from storage_specs.document import CachedDocument

LENGTH, DOCUMENTS, VOCABULARY = 2048, 4, 151_936
WAYS = {"pipe": False, "memory": True}


def looked_at(sent: Parcel) -> int:
    """Of every page of every array one byte is read."""
    arrays = [value for document in sent.open() for value in vars(document).values() if isinstance(value, np.ndarray)]
    return sum(int(array.reshape(-1).view(np.uint8)[::4096].sum(dtype=np.int64)) for array in arrays)


def shard_of(k: int) -> list[CachedDocument]:
    config = EngineConfig(model="none", dtype="bfloat16", max_model_len=LENGTH + 1, k=k, vocab_size=VOCABULARY)
    prompts = RandomPrompts(DOCUMENTS, LENGTH, VOCABULARY)
    documents = []
    for number, document in enumerate(prompts.documents):
        (window,) = prompts.windows(document)
        scores = captured_scores(fake_rows(np.random.default_rng(number), config, LENGTH), window, config)
        documents.append(cached_document(document, [window], [scores], k, min(16, k), None))
    return documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "parcels.csv")
    given = parser.parse_args()
    rows = []
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for k in given.k:
            documents = shard_of(k)
            seconds: dict[str, list[float]] = {way: [] for way in WAYS}
            answers = set()
            for repeat in range(given.repeats + 2):
                for way, in_memory in WAYS.items():
                    started = time.perf_counter()
                    with parcel(documents, in_memory) as sent:
                        answers.add(pool.submit(looked_at, sent).result())
                    if repeat >= 2:  # both processes are there by then
                        seconds[way].append(1e3 * (time.perf_counter() - started))
            if len(answers) != 1:
                raise SystemExit(f"the processes did not see the same rows: {answers}")
            rows += [_row(way, k, found) for way, found in seconds.items()]
    ResultTable(given.output).write(rows)
    for row in rows:
        print(f"{row['way']:<8} k={row['k']:<4} {row['ms']:>7} ms a shard  [{row['ms_p10']}, {row['ms_p90']}]")


def _row(way: str, k: int, found: list[float]) -> dict[str, object]:
    tenths = statistics.quantiles(found, n=10)
    return {
        "way": way,
        "k": k,
        "rows": DOCUMENTS * (LENGTH - 1),
        "repeats": len(found),
        "ms": f"{statistics.median(found):.1f}",
        "ms_p10": f"{tenths[0]:.1f}",
        "ms_p90": f"{tenths[-1]:.1f}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "versions": f"Python {platform.python_version()}, numpy {np.__version__}",
    }


if __name__ == "__main__":
    main()

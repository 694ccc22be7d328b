"""How long the plan of an epoch takes, and its memory, for caches far larger than any here: nothing is read or written.

    python scripts/plan_growth.py                                  # 10^5 shards, 2 * 10^7 documents, 10^10 rows
    python scripts/plan_growth.py --shards 1000                    # smaller

Run from the repository root (PYTHONPATH=. where the package is not installed). Stands in for an open cache with the
arrays that one has (rows, held-out marks), builds the dataset and the sampler on them, and walks a whole epoch of one
rank of 64. Prints seconds and how far the process's peak memory rose, and appends to scripts/results/plan_growth.csv.
"""

import argparse
import csv
import platform
import re
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from distill import CachedDocuments, EpochBatches
from storage_specs.reader import Cache

RESULTS = Path(__file__).parent / "results" / "plan_growth.csv"
FIELDS = ("shards", "documents", "rows", "what", "seconds", "peak_mib_more", "machine", "date")
ROWS_PER_DOCUMENT = 500


class PlannedCache(Cache):
    """The arrays of an open cache of equal shards, and no files."""

    def __init__(self, shards: int, documents_per_shard: int) -> None:
        documents = shards * documents_per_shard
        self.rows_D = np.full(documents, ROWS_PER_DOCUMENT, dtype=np.int64)
        self.held_out_D = np.zeros(documents, dtype=bool)
        self.held_out_D[::10] = True
        self.text_bytes_D = self.rows_D
        self.documents_per_shard = np.full(shards, documents_per_shard, dtype=np.int64)
        self.manifest = SimpleNamespace()


class Stopwatch:
    """Seconds and memory of one stage after the other."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float]] = []
        self._restart()

    def _restart(self) -> None:
        self.began, self.before = time.perf_counter(), peak_mib()

    def stop(self, what: str) -> None:
        self.rows.append((what, time.perf_counter() - self.began, peak_mib() - self.before))
        print(f"{what:32s} {self.rows[-1][1]:8.2f} s   peak memory +{self.rows[-1][2]:.0f} MiB", flush=True)
        self._restart()


def peak_mib() -> float:
    # Not getrusage on Linux: a process that was just started has its parent's peak there, and then nothing rises.
    if (status := Path("/proc/self/status")).exists():
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--documents_per_shard", type=int, default=200)
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV to append to")
    options = parser.parse_args(arguments)
    watch = Stopwatch()
    cache = PlannedCache(options.shards, options.documents_per_shard)
    watch.stop("(the cache's own arrays)")
    dataset = CachedDocuments(cache)
    watch.stop("dataset")
    batches = EpochBatches(dataset.documents_per_shard, documents=2, ranks=64, rank=5, seed=1)
    first = next(iter(batches))
    watch.stop("sampler and first batch")
    dataset.place_of(first[0])
    most = served = 0
    for micro_batch in batches:
        served += len(micro_batch)
        most = max(most, len(micro_batch.open_shards))
    watch.stop("a whole epoch's batches")
    print(f"{len(batches):,} batches, {served:,} of {len(dataset):,} documents, at most {most} shards open")
    new = not options.results.exists()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with options.results.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(FIELDS)
        documents = len(cache.rows_D)
        for what, seconds, more in watch.rows:
            sizes = (options.shards, documents, documents * ROWS_PER_DOCUMENT)
            writer.writerow(
                [*sizes, what, f"{seconds:.2f}", f"{more:.0f}", platform.machine(), time.strftime("%Y-%m-%d")]
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""How long the first batch of a run on a remote cache is waited for: its window of shards read in turn, or at once.

    python scripts/bench_first_batch.py                   # two minutes, once the real rows are made
    python scripts/bench_first_batch.py --documents 48 --turns 1 --latencies_ms 50 --output trial.csv

Real rows as in `bench_stream.py`, behind a store that answers each request after `--latencies_ms` and then sends it at
`--mb_per_second`, 16 requests of a shard at a time (`storage_specs.disk_cache`), into an empty disk cache. `in turn` is
what was done before: a shard is read where a document of it is first needed. Both sides run in this process, turn by
turn. Appends to scripts/results/first_batch.csv.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_stream import DOCUMENTS, LOSSES, Bench, long_cache, timed_ms
from result_table import ResultTable

from distill import CachedDocuments
from distill.sampler import MicroBatch
from distill.stream import Stream
from storage_specs.disk_cache import DiskCache
from storage_specs.local_objects import LocalObjects
from storage_specs.reader import cache_of
from storage_specs.stored_object import StoredObject

RESULTS = Path(__file__).parent / "results" / "first_batch.csv"


class FarObjects(LocalObjects):
    """A folder that answers as a store far away does."""

    def __init__(self, folder: Path, latency_ms: float, mb_per_second: float) -> None:
        super().__init__(folder)
        self.latency_ms, self.mb_per_second = latency_ms, mb_per_second

    def fetch(self, stored: StoredObject) -> bytes:
        time.sleep(self.latency_ms / 1000 + stored.size / self.mb_per_second / 1e6)
        return super().fetch(stored)


class ReadInTurn(CachedDocuments):
    """Reads a shard where a document of it is first needed."""

    def _read_open_shards(self, batch: MicroBatch) -> None:
        for shard in dict.fromkeys(self.place_of(index)[0] for index in batch):
            one = MicroBatch()
            one.open_shards = (*(set(self._open) & set(batch.open_shards)), shard)
            super()._read_open_shards(one)


ARMS = {"in turn": ReadInTurn, "at once": CachedDocuments}


def first_batch_ms(arm: str, bench: Bench, store: FarObjects) -> float:
    """From asking until it is there, tokenised and aligned."""
    with tempfile.TemporaryDirectory() as disk:
        documents = ARMS[arm](cache_of(DiskCache(store, disk, 1 << 40), bench.ids))
        stream = Stream(documents, bench.batches, bench.collator)
        try:
            return timed_ms(lambda: next(stream.at(0, 1)))
        finally:
            stream.close()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--documents", type=int, default=200, help="of which a tenth is held out (200)")
    add("--documents_per_shard", type=int, default=32)
    add("--latencies_ms", type=float, nargs="+", default=(0, 50, 200), help="before each answer (0 50 200)")
    add("--mb_per_second", type=float, default=50, help="of each answer (50)")
    add("--turns", type=int, default=5)
    add("--loss", default=LOSSES[0])
    add("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    table, rows = ResultTable(options.output), []
    with long_cache(options.documents, options.documents_per_shard) as (cache, student):
        bench = Bench(cache, options.loss, student)
        for latency_ms in options.latencies_ms:
            store = FarObjects(cache, latency_ms, options.mb_per_second)
            found: dict[str, list[float]] = {arm: [] for arm in ARMS}
            for _ in range(options.turns):
                for arm, times in found.items():
                    times.append(first_batch_ms(arm, bench, store))
            rows += [measured(arm, times, latency_ms, bench, options) for arm, times in found.items()]
            table.write(rows)
    return 0


def measured(
    arm: str, times: Sequence[float], latency_ms: float, bench: Bench, options: argparse.Namespace
) -> dict[str, Any]:
    """A CSV row, printed too."""
    p10, p90 = np.percentile(times, [10, 90])
    print(f"{latency_ms:g} ms, shards {arm}: first batch after {statistics.median(times):.0f} ms ({p10:.0f}-{p90:.0f})")
    return {
        "arm": arm,
        "loss": bench.loss,
        "latency_ms": f"{latency_ms:g}",
        "mb_per_second": f"{options.mb_per_second:g}",
        "documents_per_shard": options.documents_per_shard,
        "documents_per_batch": DOCUMENTS,
        "turns": options.turns,
        "first_batch_ms": f"{statistics.median(times):.4g}",
        "first_batch_ms_p10": f"{p10:.4g}",
        "first_batch_ms_p90": f"{p90:.4g}",
        "load": f"{os.getloadavg()[0]:.1f}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

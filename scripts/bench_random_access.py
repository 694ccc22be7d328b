"""How long one document of a cache in a far object store takes, and how many requests one after the other it costs.

    python scripts/bench_random_access.py [--delay_ms 20] [--output scripts/results/random_access.csv]

The store is moto's S3 server on loopback, behind a proxy that waits before every answer. Compared are, in this process
and turn by turn, the reader as it is, which announces what it will read and has it fetched at once, and the same reader
that asks for one range after the other. Rows are those of Gemma-3-270M (`real_documents.py`), in shards of 65,536, the
shards' records read before. New rows are appended.
"""

import argparse
import csv
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
from bench_reader import write_cache
from real_documents import real_documents, resampled

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from object_stores import moto_server, new_bucket

from storage_specs import open_cache
from storage_specs.copying import copy_cache
from storage_specs.remote_objects import RemoteObjects

WAYS = ("announced", "one after the other")


@contextmanager
def reading(way: str) -> Iterator[list[str]]:
    """Read that way inside; gives the list of the calls that waited for the store, each after the one before."""
    calls: list[str] = []
    expect, read_range = RemoteObjects.expect, RemoteObjects.read_range

    def noted_expect(self: RemoteObjects, ranges: list) -> dict:
        if way != "announced":
            return {}
        calls.append("expect")
        return expect(self, ranges)

    def noted_range(self: RemoteObjects, *wanted: object) -> bytes:
        calls.append("read_range")
        return read_range(self, *wanted)

    RemoteObjects.expect, RemoteObjects.read_range = noted_expect, noted_range
    try:
        yield calls
    finally:
        RemoteObjects.expect, RemoteObjects.read_range = expect, read_range


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=131_072)
    parser.add_argument("--documents", type=int, default=40, help="read in each way, in random order")
    parser.add_argument("--delay_ms", type=float, default=20.0, help="before each of the store's answers")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "random_access.csv")
    arguments = parser.parse_args()
    documents = resampled(real_documents(), arguments.rows)
    chosen = np.random.default_rng(0).choice(len(documents), arguments.documents, replace=False).tolist()
    machine = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version()}
    machine |= {name: version(name) for name in ("obstore", "zarr", "pyarrow")}
    found = []
    with tempfile.TemporaryDirectory() as scratch, moto_server() as address, new_bucket(address) as bucket:
        os.environ |= bucket.environment
        for store in ("zarr", "arrow"):
            write_cache(Path(scratch) / store, store, documents, "compact")
            copy_cache(Path(scratch) / store, f"{bucket.url}/{store}")
            cache = open_cache(f"{bucket.url}/{store}")
            for shard in range(len(cache.documents_per_shard)):
                cache[int(cache.table.first_document[shard])]
            bucket.proxy.delay_seconds = arguments.delay_ms / 1000
            milliseconds: dict[str, list[float]] = {way: [] for way in WAYS}
            requests, waits = dict.fromkeys(WAYS, 0), dict.fromkeys(WAYS, 0)
            for number in chosen:
                for way in WAYS:
                    bucket.proxy.requests.clear()
                    with reading(way) as calls:
                        started = time.perf_counter()
                        document = cache[number]
                        milliseconds[way].append(1000 * (time.perf_counter() - started))
                    assert document.text == documents[number].text
                    requests[way] += bucket.proxy.requests.total()
                    waits[way] += len(calls)
            bucket.proxy.delay_seconds = 0.0
            for way in WAYS:
                p10, *_, p90 = statistics.quantiles(milliseconds[way], n=10)
                found.append(
                    {
                        "store": store,
                        "way": way,
                        "delay_ms": arguments.delay_ms,
                        "documents": len(chosen),
                        "requests": requests[way] / len(chosen),
                        "waits_one_after_the_other": waits[way] / len(chosen),
                        "ms": round(statistics.median(milliseconds[way]), 1),
                        "ms_p10": round(p10, 1),
                        "ms_p90": round(p90, 1),
                        **machine,
                    }
                )
                print(*found[-1].values(), flush=True)
    is_new = not arguments.output.exists()
    with arguments.output.open("a", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, fieldnames=list(found[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()

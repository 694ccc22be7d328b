"""How fast a cache is read, beside how others keep the same rows: rows per second, bytes per row, one document cold.

    python scripts/bench_reader.py [--distillkit CHECKOUT] [--rows 600000] [--output scripts/results/reader.csv]
    python scripts/bench_reader.py --rows 20000 --output /dev/null     # a minute, once the real rows are made

Rows are those of Gemma-3-270M (`real_documents.py`: some 9,000, made on the first call), whole documents repeated in
their order until there are enough; no inner chunk, page group or block is long enough to see a row twice and compress
it away. Both sides run in this process, on one thread; rates are per second of processor time, kernel
included. `--distillkit` takes a clone of github.com/arcee-ai/DistillKit, which is on no package registry. New rows are
appended.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from reader_baselines import Baseline, DistillKit, PackedIds, ParquetLists, RawNumpy, Rows
from real_documents import RANKS, real_documents, resampled

from distill.reader_benchmark import ReaderFigures, Spread, bench_reader
from storage_specs import CacheSettings, CacheWriter, make_plan, open_cache
from storage_specs.document import CachedDocument
from storage_specs.vocabulary import Vocabulary

REPEATS = 5
ROWS_PER_SHARD = 65_536
VOCABULARY = 262_144  # Gemma's
K_IDS = 16


def write_cache(folder: Path, store: str, documents: list[CachedDocument], profile: str) -> None:
    """A cache of the documents with the ids of the first K_IDS ranks."""
    words = Vocabulary(token_bytes=[b"%d" % number for number in range(VOCABULARY)], special_roles={})
    settings = CacheSettings(
        teacher={"name": "gemma-3-270m"},
        tokenizer={"digest": "0" * 64},
        chat_template=None,
        engine={"name": "transformers"},
        k=RANKS,
        k_ids=K_IDS,
        vocab_size=VOCABULARY,
        store=store,
        profile=profile,
        windows={},
        vocabulary=words,
    )
    mean_rows = sum(len(document.segment) for document in documents) / len(documents)
    plan = make_plan(documents, max(1, round(ROWS_PER_SHARD / mean_rows)))
    writer = CacheWriter(folder, settings, plan)
    for shard in writer.missing_shards():
        chosen = [documents[number] for number in plan.shards[shard]]
        writer.write_shard(shard, [_cut_ids(document) for document in chosen])
    writer.finalize()


def _cut_ids(document: CachedDocument) -> CachedDocument:
    return CachedDocument(**vars(document) | {"token_ids": np.ascontiguousarray(document.token_ids[:, :K_IDS])})


def rows_of(documents: list[CachedDocument]) -> Rows:
    return Rows(
        probs=np.concatenate([document.probs for document in documents]),
        tail_mass=np.concatenate([document.tail_mass for document in documents]),
        ids=np.concatenate([document.token_ids for document in documents]),
        document_rows=np.array([len(document.segment) for document in documents]),
    )


def value_bytes(folder: Path) -> float:
    """Bytes per row of the objects and parts that hold values, of the Zarr store; all stored bytes of any other."""
    cache = open_cache(folder)
    names = {spec.name for spec in cache.manifest.row_shape.codec.arrays()}
    stored = [item for shard in range(len(cache.table)) for item in cache.table.objects[shard]]
    wanted = [item for item in stored if ".zarr/" in item.name and item.name.split("/")[2] in names]
    return sum(item.size for item in wanted) / cache.manifest.counts["rows"] if wanted else float("nan")


def peak_of(folder: Path) -> float:
    """MiB of a fresh process that does nothing but `distill bench reader`."""
    command = [sys.executable, "-m", "distill", "bench", "reader", str(folder), "--json", "--repeats", "1"]
    done = subprocess.run([*command, "--documents", "5"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["peak_mib"]


def timed(work: Callable[[], int]) -> Spread:
    """Rows per second of processor time; the first time fills the page cache."""
    work()
    rates = []
    for _ in range(REPEATS):
        started = time.process_time()
        rows = work()
        rates.append(rows / (time.process_time() - started))
    return Spread.of(rates)


def measured(baseline: Baseline, rows: Rows, folder: Path) -> dict[str, object]:
    """A CSV row of one way of others."""
    folder.mkdir()
    baseline.write(rows, folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    error = seen = 0.0
    for probs in baseline.read(folder):
        start = int(seen)
        seen += len(probs)
        error += np.abs(probs.astype(np.float64) - rows.probs[start : int(seen)]).sum()
    rate = timed(lambda: sum(len(probs) for probs in baseline.read(folder)))
    return {"what": baseline.name, "bytes_per_row": size / seen, "mean_l1_of_values": error / seen} | _rate(rate)


def ours(folder: Path, figures: ReaderFigures, what: str) -> dict[str, object]:
    row: dict[str, object] = {
        "what": what,
        "bytes_per_row": figures.stored_bytes / figures.rows,
        "value_bytes_per_row": value_bytes(folder),
        "mean_l1_of_values": open_cache(folder).manifest.codec["mean_l1_error"],
        "checksums_gb_per_second": figures.gigabytes_per_second.median,
        "peak_mib": peak_of(folder),
    }
    for name, spread in (("cold", figures.cold_ms), ("warm", figures.warm_ms)):
        if spread is not None:
            row |= {f"one_document_{name}_ms": spread.median, f"one_document_{name}_ms_p90": spread.p90}
    return row | _rate(figures.rows_per_second)


def _rate(spread: Spread) -> dict[str, object]:
    return {"rows_per_second": spread.median, "rows_per_second_p10": spread.p10, "rows_per_second_p90": spread.p90}


FIELDS = (
    "what",
    "rows",
    "bytes_per_row",
    "value_bytes_per_row",
    "mean_l1_of_values",
    "rows_per_second",
    "rows_per_second_p10",
    "rows_per_second_p90",
    "checksums_gb_per_second",
    "one_document_cold_ms",
    "one_document_cold_ms_p90",
    "one_document_warm_ms",
    "one_document_warm_ms_p90",
    "peak_mib",
    "machine",
    "python",
    "zarr",
    "numcodecs",
    "pyarrow",
    "numpy",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600_000)
    parser.add_argument("--profile", default="compact")
    parser.add_argument("--distillkit", type=Path, metavar="CHECKOUT", help="a clone of arcee-ai/DistillKit")
    parser.add_argument("--distillkit_rows", type=int, default=50_000, help="fewer for it: it is slow to write")
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder without it")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "reader.csv")
    arguments = parser.parse_args()
    documents = resampled(real_documents(), arguments.rows)
    rows = rows_of(documents)
    machine = {"machine": f"{platform.machine()}, 1 of {os.cpu_count()} cores", "python": platform.python_version()}
    machine |= {name: version(name) for name in ("zarr", "numcodecs", "pyarrow", "numpy")}
    found = []

    def note(row: dict[str, object], count: int) -> None:
        row = {"rows": count, **row, **machine}
        row = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}
        found.append(row)
        speed = row["rows_per_second"] / 1e6
        print(f"{row['what']:75}{row['bytes_per_row']:8.1f} B/row {speed:8.3f} M rows/s", flush=True)

    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        for store in ("zarr", "arrow"):
            write_cache(folder / store, store, documents, arguments.profile)
            for ids in (False, True):
                what = f"ours, {store}, {arguments.profile}, {f'ids of {K_IDS} ranks' if ids else 'ids unread'}"
                figures = bench_reader(folder / store, ids=ids, repeats=REPEATS)
                note(ours(folder / store, figures, what), figures.rows)
        baselines: list[Baseline] = [RawNumpy(), ParquetLists(with_ids=False), ParquetLists(), PackedIds()]
        for number, baseline in enumerate(baselines):
            note(measured(baseline, rows, folder / str(number)), len(rows.probs))
        if arguments.distillkit is not None:
            fewer = rows_of(resampled(real_documents(), min(arguments.rows, arguments.distillkit_rows)))
            note(measured(DistillKit(arguments.distillkit, RANKS), fewer, folder / "distillkit"), len(fewer.probs))
    is_new = not arguments.output.exists() or not arguments.output.stat().st_size
    with arguments.output.open("a", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, fieldnames=FIELDS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()

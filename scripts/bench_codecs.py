"""Speed of the value codecs: rows per second of one core, by profile, store and step; every line one CSV row.

    python scripts/bench_codecs.py            # about 6 minutes, most of them for the teacher's rows

8,192 rows of Gemma-3-270M (scripts/real_rows.py), packed as the stores pack them. "read" is from objects in memory to
rows: checksums, decompression, the check of the numbers, decoding; "write" the way back, with the L1 error measured.
"numpy copy" is the limit: float32 rows that are only copied. Processor time of this process, all its threads; the
median, 10th and 90th percentile of the runs. Appends to scripts/results/codecs.csv.
"""

import argparse
import csv
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numcodecs import blosc
from real_pair import RealPair
from real_rows import RealRows, real_rows

from storage_specs import arrow_store, zarr_chunks, zarr_store
from storage_specs.codecs import PROFILES, Codec, RowValues, codec_of, default_k, default_parameters, encode_measured
from storage_specs.document import text_document
from storage_specs.shard_bytes import WholeObjects
from storage_specs.stored_shard import Selection, ShardArrays, StoredShard

VOCABULARY = 262_144
FIELDS = ("profile", "store", "what", "rows_per_second", "p10", "p90", "bytes_per_row", "rows", "machine", "versions")


class Bench:
    """Times functions over the same rows, and writes what it finds."""

    def __init__(self, rows: int, results: Path, runs: int) -> None:
        self.rows, self.results, self.runs = rows, results, runs

    def measure(self, profile: str, store: str, what: str, run: Callable[[], object], size: int | None = None) -> None:
        run()
        speeds = []
        for _ in range(self.runs):
            started = time.process_time()
            run()
            speeds.append(self.rows / (time.process_time() - started))
        figures = [f"{value:.0f}" for value in np.quantile(speeds, (0.5, 0.1, 0.9))]
        per_row = "" if size is None else f"{size / self.rows:.3f}"
        versions = f"zarr {zarr.__version__}, pyarrow {pa.__version__}, numpy {np.__version__}"
        machine = f"{platform.machine()}, 1 core, Python {platform.python_version()}"
        print(f"{profile:12s} {store:6s} {what:22s} {figures[0]:>10s} rows/s  [{figures[1]}, {figures[2]}]  {per_row}")
        new = not self.results.exists()
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with self.results.open("a", newline="", encoding="utf8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(FIELDS)
            writer.writerow([profile, store, what, *figures, per_row, self.rows, machine, versions])


def bench_profile(bench: Bench, profile: str, rows: RealRows) -> None:
    k = default_k(profile)
    codec = codec_of(profile, k=k, parameters=default_parameters(profile, k=k, vocab_size=VOCABULARY))
    edges = getattr(codec, "rank_edges", None)
    values = rows.values(k, None if edges is None else np.array(edges))
    arrays = codec.encode(values)
    bench.measure(profile, "", "encode, and measure", lambda: encode_measured(codec, values))
    bench.measure(profile, "", "check", lambda: codec.problem_of(arrays))
    bench.measure(profile, "", "decode", lambda: codec.decode(arrays))
    shard = StoredShard(
        documents=tuple(text_document("x") for _ in rows.document_rows),
        document_rows=np.array(rows.document_rows),
        arrays=arrays,
        tables={},
    )
    for store, write, read in (
        ("zarr", lambda: _zarr_objects(codec, shard), _zarr_arrays),
        ("arrow", lambda: arrow_store.encode(shard, ShardArrays(arrays=codec.arrays(), tables={}), "x"), _arrow_arrays),
    ):
        objects = {name: item.data for name, item in write().items()}
        size = sum(len(data) for name, data in objects.items() if not name.endswith("zarr.json"))
        bench.measure(profile, store, "write", lambda write=write: (encode_measured(codec, values), write()), size)
        source = WholeObjects(objects)
        bench.measure(
            profile, store, "read", lambda read=read, source=source: _rows(codec, read(codec, source, shard)), size
        )


def _rows(codec: Codec, arrays: dict[str, np.ndarray]) -> RowValues:
    assert codec.problem_of(arrays) is None
    return codec.decode(arrays)


def _zarr_objects(codec: Codec, shard: StoredShard) -> dict:
    objects = {}
    for spec in codec.arrays():
        objects |= zarr_chunks.encode(spec.name, shard.arrays[spec.name], spec, zarr_store.ROWS_PER_CHUNK)
    return objects


def _zarr_arrays(codec: Codec, source: WholeObjects, shard: StoredShard) -> dict[str, np.ndarray]:
    rows = shard.size.rows
    return {spec.name: zarr_chunks.decode(source, spec.name, spec, rows, 0, rows) for spec in codec.arrays()}


def _arrow_arrays(codec: Codec, source: WholeObjects, shard: StoredShard) -> dict[str, np.ndarray]:
    wanted, size = ShardArrays(arrays=codec.arrays(), tables={}), shard.size
    return arrow_store.decode(source, "x", wanted, size, Selection.everything(size)).arrays


def bench_others(bench: Bench, probs_NK: np.ndarray) -> None:
    """The limit, and lists of floats as others write them to Parquet."""
    bench.measure("float32 raw", "numpy", "read", lambda: probs_NK.copy(), probs_NK.nbytes)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(probs_NK.reshape(-1)), probs_NK.shape[1])
    table = pa.table({"probs": lists.cast(pa.list_(pa.float32()))})
    for compression in ("snappy", "zstd"):
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression=compression)
        data = sink.getvalue()

        def read(data: pa.Buffer = data) -> np.ndarray:
            column = pq.read_table(pa.BufferReader(data), use_threads=False)["probs"].combine_chunks()
            return column.flatten().to_numpy().reshape(probs_NK.shape).copy()

        bench.measure(f"list<float>, {compression}", "arrow", "read", read, data.size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--output_file", type=Path, default=Path(__file__).parent / "results" / "codecs.csv")
    options = parser.parse_args()
    blosc.use_threads = False
    pa.set_cpu_count(1)
    edges = default_parameters("sketch", k=default_k("sketch"), vocab_size=VOCABULARY)["rank_edges"]
    rows = real_rows(RealPair(), options.rows, set(edges))
    bench = Bench(len(rows.top), options.output_file, options.runs)
    for profile in PROFILES:
        bench_profile(bench, profile, rows)
    bench_others(bench, rows.values(default_k("compact")).probs)


if __name__ == "__main__":
    main()

"""Bytes per row against error, for every profile and for what others write, on real rows.

    python scripts/rate_error.py                      # about 15 minutes on one core; 4 GiB
    python scripts/rate_error.py --rows 500 --passages 1 --tokens 40 --output_folder /tmp     # a minute

Rows: Gemma-3-270M on Wikipedia text; the ULD is taken against SmolLM2-135M at shared boundaries (models and text:
scripts/demo_assets.py).
Writes rate_error.csv and rate_error.svg. Columns: bytes of the values of a row as the Zarr store and as the Arrow store
pack them (whole objects of one array each, without zarr.json and footers); L1 error of storing a row: mean, 99th
percentile, largest, proven bound; mean and largest absolute error of the full ULD, over the whole vocabulary, when only
the stored values are known: sum |p - q| over the head and |tail - tail|, or for `sketch` over `expand_sorted`; and the
mean cosine between its gradient by the student's logits and the full one's.

Others: raw numpy, float16 under blosc, lists of floats in Parquet as pyarrow writes them without being told anything,
and pcodec, a good numerical codec that is not among Zarr's core ones.
"""

import argparse
import csv
import io
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from full_uld import FullULD
from numcodecs import Blosc
from pcodec import ChunkConfig, standalone
from rate_error_plot import draw
from real_pair import RealPair
from real_rows import RealRows, real_rows, whole_rows

from storage_specs import arrow_store, zarr_chunks, zarr_store
from storage_specs.codecs import Codec, RowValues, codec_of, encode_measured, l1_error
from storage_specs.codecs.sketch import BINS, HEAD, STEP_BITS
from storage_specs.document import text_document
from storage_specs.sketch import log_rank_edges
from storage_specs.stored_shard import ShardArrays, StoredShard

VOCABULARY = 262_144
HEADS = (16, 32, 64, 128)
STEPS = (11, 12, 13, 14, 15)
# (k, bins, step_bits)
SKETCHES = ((8, 20, 11), (16, 12, 11), (16, 16, 11), (24, 16, 11))
SKETCHES += ((HEAD, BINS, STEP_BITS - 1), (HEAD, BINS, STEP_BITS), (HEAD, BINS, STEP_BITS + 1))
FIELDS = ("what", "k", "bins", "step_bits", "zarr_bytes", "arrow_bytes", "l1_mean", "l1_p99", "l1_max", "l1_bound")
FIELDS += ("uld_error_mean", "uld_error_max", "uld_gradient_cosine", "rows", "pair_rows", "machine", "versions")


class Measurement:
    """Teacher rows, the loss on the pair's whole rows, and the lines of the table."""

    def __init__(self, rows: RealRows, loss: FullULD) -> None:
        self.rows, self.loss = rows, loss
        self.lines: list[dict[str, object]] = []

    def profile(self, name: str, k: int, bins: int | None = None, step_bits: int | None = None) -> None:
        """One variant of one of our profiles."""
        edges = log_rank_edges(k, VOCABULARY, bins) if bins else None
        parameters = {} if step_bits is None else {"step_bits": step_bits}
        codec = codec_of(name, k=k, parameters=parameters | ({} if edges is None else {"rank_edges": edges.tolist()}))
        arrays, l1_N = encode_measured(codec, self.rows.values(k, edges))
        pair_rows = self._pair_values(k, edges)
        decoded = codec.decode(codec.encode(pair_rows))
        uld = self.loss.of_head(decoded) if edges is None else self.loss.of_sketch(decoded, edges)
        stored = {"zarr_bytes": self._zarr_bytes(codec, arrays), "arrow_bytes": self._arrow_bytes(codec, arrays)}
        self._line(name, k, l1_N, uld, bins=bins, step_bits=step_bits, l1_bound=codec.max_l1_error, **stored)

    def unquantised_sketch(self, k: int, bins: int) -> None:
        """What the power laws alone cost."""
        edges = log_rank_edges(k, VOCABULARY, bins)
        uld = self.loss.of_sketch(self._pair_values(k, edges), edges)
        self._line("sketch, float32 values", k, np.zeros(1), uld, bins=bins, zarr_bytes=4 * (k + bins))

    def other(self, name: str, k: int, size: Callable[[np.ndarray], int], decode: Callable | None = None) -> None:
        """What others write: `size` in bytes of (N, K) float32, `decode` to what they read back."""
        values, pair_rows = self.rows.values(k), self._pair_values(k)

        def back(rows: RowValues) -> RowValues:
            probs = rows.probs if decode is None else decode(rows.probs).astype(np.float32)
            tail = np.clip(1 - probs.sum(axis=1, dtype=np.float64), 0, 1).astype(np.float32)
            return RowValues(probs=probs, tail_mass=tail)

        column = "arrow_bytes" if name.startswith("Parquet") else "zarr_bytes"
        stored = {column: size(values.probs) / len(values.probs)}
        self._line(name, k, l1_error(values, back(values)), self.loss.of_head(back(pair_rows)), **stored)

    def _line(self, name: str, k: int, l1_N: np.ndarray, uld: tuple[np.ndarray, np.ndarray], **more: object) -> None:
        error_M, cosine_M = uld
        figures = {
            "l1_mean": l1_N.mean(),
            "l1_p99": np.quantile(l1_N, 0.99),
            "l1_max": l1_N.max(),
            "uld_error_mean": error_M.mean(),
            "uld_error_max": error_M.max(),
            "uld_gradient_cosine": cosine_M.mean(),
        }
        numbers = figures | {key: value for key, value in more.items() if isinstance(value, float)}
        others = {key: value for key, value in more.items() if value is not None and key not in numbers}
        versions = f"zarr {zarr.__version__}, pyarrow {pa.__version__}, numpy {np.__version__}"
        about = {"what": name, "k": k, "rows": len(self.rows.top), "pair_rows": len(self.loss.full_M)}
        about |= {"machine": f"{platform.machine()}, Python {platform.python_version()}", "versions": versions}
        self.lines.append(about | others | {key: f"{value:.5g}" for key, value in numbers.items()})
        print({key: value for key, value in self.lines[-1].items() if key not in ("machine", "versions")}, flush=True)

    def _pair_values(self, k: int, rank_edges: np.ndarray | None = None) -> RowValues:
        edges = [k] if rank_edges is None else rank_edges.tolist()
        masses = {edge: self.loss.sorted_MU[:, edge:].sum(axis=1, dtype=np.float64) for edge in edges}
        return RealRows(top=self.loss.sorted_MU, masses=masses, document_rows=[]).values(k, rank_edges)

    def _zarr_bytes(self, codec: Codec, arrays: dict[str, np.ndarray]) -> float:
        objects = {}
        for spec in codec.arrays():
            objects |= zarr_chunks.encode(spec.name, arrays[spec.name], spec, zarr_store.ROWS_PER_CHUNK)
        return sum(len(item.data) for name, item in objects.items() if "/c/" in name) / len(self.rows.top)

    def _arrow_bytes(self, codec: Codec, arrays: dict[str, np.ndarray]) -> float:
        lengths = np.array(self.rows.document_rows)
        shard = StoredShard(
            documents=tuple(text_document("x") for _ in lengths), document_rows=lengths, arrays=arrays, tables={}
        )
        (item,) = arrow_store.encode(shard, ShardArrays(arrays=codec.arrays(), tables={}), "x").values()
        return column_bytes(item.data, set(arrays)) / len(self.rows.top)


def column_bytes(data: bytes, names: set[str]) -> int:
    """Compressed size of some columns of a Parquet file."""
    metadata = pq.read_metadata(io.BytesIO(data))
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(metadata.num_columns)]
    return sum(column.total_compressed_size for column in columns if column.path_in_schema.split(".")[0] in names)


def as_others_write(values_NK: np.ndarray, **options: object) -> int:
    """Bytes of a list of numbers per row in Parquet."""
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values_NK.reshape(-1)), values_NK.shape[1]).cast(
        pa.list_(pa.from_numpy_dtype(values_NK.dtype))
    )
    sink = io.BytesIO()
    pq.write_table(pa.table({"probs": lists}), sink, **options)
    return column_bytes(sink.getvalue(), {"probs"})


def chunked(values_NK: np.ndarray, size: Callable[[np.ndarray], int]) -> int:
    """Sum of the sizes of rank-major chunks."""
    step = zarr_store.ROWS_PER_CHUNK
    return sum(size(np.ascontiguousarray(values_NK[at : at + step].T)) for at in range(0, len(values_NK), step))


def by_pcodec(ranks_KN: np.ndarray) -> int:
    config = ChunkConfig(compression_level=8)
    return sum(len(standalone.simple_compress(rank_N, config)) for rank_N in ranks_KN)


def measure_others(measurement: Measurement) -> None:
    half = lambda probs_NK: probs_NK.astype(np.float16)  # noqa: E731
    log_half = lambda probs_NK: np.log(np.maximum(probs_NK, 1e-7)).astype(np.float16)  # noqa: E731
    log_back = lambda probs_NK: np.exp(log_half(probs_NK).astype(np.float32))  # noqa: E731
    steps = lambda probs_NK: np.rint(probs_NK * 8192).astype(np.uint16)  # noqa: E731
    falls = lambda probs_NK: -np.diff(steps(probs_NK).astype(np.int32), axis=1, append=0)  # noqa: E731
    blosc = Blosc("zstd", 9, Blosc.BITSHUFFLE)
    measurement.other("float32 raw", 64, lambda probs_NK: probs_NK.nbytes)
    measurement.other("float16 raw", 64, lambda probs_NK: half(probs_NK).nbytes, half)
    measurement.other("float16, blosc", 64, lambda p: chunked(half(p), lambda x: len(blosc.encode(x))), half)
    measurement.other("float16 log, pcodec", 64, lambda p: chunked(log_half(p), by_pcodec), log_back)
    measurement.other(
        "rounded to 2^-13, drops, pcodec",
        64,
        lambda p: chunked(falls(p).astype(np.uint16), by_pcodec),
        lambda p: steps(p) / 8192,
    )
    measurement.other("Parquet list<float>, snappy", 64, as_others_write)
    measurement.other("Parquet list<float>, zstd", 64, lambda p: as_others_write(p, compression="zstd"))
    measurement.other("Parquet list<halffloat>, zstd", 64, lambda p: as_others_write(half(p), compression="zstd"), half)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--passages", type=int, default=8, help="passages on which the pair is compared")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of each that both models read")
    parser.add_argument("--output_folder", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    pair = RealPair()
    edges = {int(edge) for k, bins, _ in SKETCHES for edge in log_rank_edges(k, VOCABULARY, bins)}
    loss = FullULD(*whole_rows(pair, options.passages, options.tokens))
    print(f"full ULD of {len(loss.full_M)} rows: {loss.full_M.mean():.4f}", flush=True)
    measurement = Measurement(real_rows(pair, options.rows, edges), loss)
    for name in ("exact", "half"):
        for k in HEADS:
            measurement.profile(name, k)
    for k in HEADS:
        for step_bits in STEPS:
            measurement.profile("compact", k, step_bits=step_bits)
    measure_others(measurement)
    for k, bins, step_bits in SKETCHES:
        measurement.profile("sketch", k, bins, step_bits)
    for k, bins in ((16, 16), (HEAD, BINS)):
        measurement.unquantised_sketch(k, bins)
    options.output_folder.mkdir(parents=True, exist_ok=True)
    with (options.output_folder / "rate_error.csv").open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(measurement.lines)
    (options.output_folder / "rate_error.svg").write_text(draw(measurement.lines), encoding="utf8")


if __name__ == "__main__":
    main()

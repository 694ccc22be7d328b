"""How others keep the same rows on disk: each format written, and read back to log-probabilities or probabilities.

For `bench_reader.py`. DistillKit's format goes through its own package where a checkout is given (it is on no package
registry); else only its documented layout of ids is measured, under a name that says so.

Legend: N rows, K ranks.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

VOCABULARY = 262_144  # Gemma's
ROWS_AT_ONCE = 8192  # what the DistillKit reader is handed at a time: more takes gigabytes, its unpacked bits are int64


@dataclass(frozen=True, kw_only=True)
class Rows:
    """probs: (N, K) float32. tail_mass: (N,) float32. ids: (N, K) int64. document_rows: rows of each document."""

    probs: np.ndarray
    tail_mass: np.ndarray
    ids: np.ndarray
    document_rows: np.ndarray

    @property
    def offsets(self) -> np.ndarray:
        return np.cumsum([0, *self.document_rows], dtype=np.int32)


class Baseline(Protocol):
    """name: with what is kept. write: makes files in a folder. read: all rows' probabilities (n, K), block by block."""

    name: str

    def write(self, rows: Rows, folder: Path) -> None: ...

    def read(self, folder: Path) -> Iterator[np.ndarray]: ...


class RawNumpy:
    """float32 values and tail as .npy, copied from the page cache: nothing can be read faster."""

    name = "raw .npy, float32 (the limit)"

    def write(self, rows: Rows, folder: Path) -> None:
        np.save(folder / "probs.npy", rows.probs)
        np.save(folder / "tail.npy", rows.tail_mass)

    def read(self, folder: Path) -> Iterator[np.ndarray]:
        np.load(folder / "tail.npy")
        yield np.load(folder / "probs.npy")


class ParquetLists:
    """One row per document, list<list<float>> of log-probabilities and list<list<int>> of ids, pyarrow's defaults."""

    name = "Parquet of lists: float32 values + int32 ids"

    def __init__(self, with_ids: bool = True) -> None:
        self.with_ids = with_ids
        if not with_ids:
            self.name = "Parquet of lists: float32 values only"

    def write(self, rows: Rows, folder: Path) -> None:
        count, k = rows.probs.shape
        inner = pa.array(np.arange(count + 1, dtype=np.int32) * k)
        lists = {
            "logprobs": pa.array(
                np.log(rows.probs, where=rows.probs > 0, out=np.full_like(rows.probs, -1e4)).reshape(-1)
            )
        }
        if self.with_ids:
            lists["token_ids"] = pa.array(rows.ids.astype(np.int32).reshape(-1))
        columns = {
            name: pa.ListArray.from_arrays(pa.array(rows.offsets), pa.ListArray.from_arrays(inner, flat))
            for name, flat in lists.items()
        }
        pq.write_table(pa.table(columns), folder / "rows.parquet", row_group_size=64)

    def read(self, folder: Path) -> Iterator[np.ndarray]:
        for batch in pq.ParquetFile(folder / "rows.parquet").iter_batches(64, use_threads=False):
            columns = [column.flatten() for column in batch.columns]
            flat = [column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1) for column in columns]
            yield np.exp(flat[0])


class DistillKit:
    """Its recommended recipe (its README: 16 exact values in bfloat16, a polynomial for the rest, 18-bit ids).

    Written through its compressor into its own Parquet schema; read as its trainer does: lists to tensors, then
    `decompress_to_sparse`. Apache-2.0, by Arcee AI; commit a61c2e7 when this was written.
    """

    def __init__(self, checkout: Path, k: int) -> None:
        sys.path.insert(0, str(checkout))
        import torch
        from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor

        torch.set_num_threads(1)
        self.name = f"DistillKit, its own code, recommended recipe at k {k}"
        terms: list[Any] = [0, 1, 2, 3, 4, "sqrt"]
        self.compressor = LogprobCompressor(
            config=DistributionQuantizationConfig(
                d=VOCABULARY,
                k=k,
                exact_k=16,
                exact_dtype="bfloat16",
                polynomial_terms=terms,
                term_dtype="float32",
                residual_bins=[],
                delta_encoding=False,
                error_diffusion=False,
            )
        )

    def write(self, rows: Rows, folder: Path) -> None:
        import torch
        from distillkit.sample_common import compressed_logit_schema

        packed: dict[str, list[np.ndarray]] = {"compressed_logprobs": [], "bytepacked_indices": []}
        for start in range(0, len(rows.probs), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            logprobs = torch.from_numpy(np.log(np.maximum(rows.probs[part], 1e-30)))
            for name, values in self.compressor.compress_from_sparse(
                torch.from_numpy(rows.ids[part]), logprobs
            ).items():
                packed[name].append(values.numpy())
        offsets = pa.array(rows.offsets)
        columns = {"input_ids": pa.ListArray.from_arrays(offsets, pa.array(rows.ids[:, 0].astype(np.uint64)))}
        for name, parts in packed.items():
            values = np.concatenate(parts)
            inner = pa.array(np.arange(len(values) + 1, dtype=np.int32) * values.shape[1])
            lists = pa.ListArray.from_arrays(inner, pa.array(values.reshape(-1)))
            columns[name] = pa.ListArray.from_arrays(offsets, lists)
        table = pa.table(columns)
        schema = compressed_logit_schema()
        pq.write_table(table.select(schema.names).cast(schema), folder / "data_0.parquet", row_group_size=64)

    def read(self, folder: Path) -> Iterator[np.ndarray]:
        import torch

        for batch in pq.ParquetFile(folder / "data_0.parquet").iter_batches(16, use_threads=False):
            row = {}
            for name in ("compressed_logprobs", "bytepacked_indices"):
                lists = batch[name].flatten()
                row[name] = torch.from_numpy(lists.flatten().to_numpy(zero_copy_only=False).copy()).reshape(
                    len(lists), -1
                )
            _, logprobs = self.compressor.decompress_to_sparse(row)
            yield logprobs.exp().numpy()


class PackedIds:
    """DistillKit's documented layout of ids, by our own code: bits of all ids of a row, most significant first."""

    name = "18-bit packed ids + float16 values (DistillKit's layout of ids, our code)"
    bits = VOCABULARY.bit_length() - 1

    def write(self, rows: Rows, folder: Path) -> None:
        shifts = np.arange(self.bits - 1, -1, -1)
        packed = [
            np.packbits(((rows.ids[start : start + ROWS_AT_ONCE, :, None] >> shifts) & 1).astype(np.uint8), axis=None)
            for start in range(0, len(rows.ids), ROWS_AT_ONCE)
        ]
        np.concatenate(packed).tofile(folder / "ids.bin")
        np.save(folder / "values.npy", rows.probs.astype(np.float16))

    def read(self, folder: Path) -> Iterator[np.ndarray]:
        values_NK = np.load(folder / "values.npy").astype(np.float32)
        packed = np.fromfile(folder / "ids.bin", np.uint8)
        count, k = values_NK.shape
        weights = (1 << np.arange(self.bits - 1, -1, -1)).astype(np.int32)
        per_row = k * self.bits // 8
        for start in range(0, count, ROWS_AT_ONCE):
            bits = np.unpackbits(packed[start * per_row : (start + ROWS_AT_ONCE) * per_row]).reshape(-1, k, self.bits)
            _ = bits @ weights
            yield values_NK[start : start + ROWS_AT_ONCE]

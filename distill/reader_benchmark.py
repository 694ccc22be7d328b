"""How fast a cache is read on this machine: decoding, checking, and one document with its shard cold.

Rates are per second of one core's processor time, kernel included, so that a busy machine does not blur them; times of
random access are on the wall clock, because the disk's share counts.
"""

import os
import random
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from storage_specs.errors import ConfigError
from storage_specs.object_roots import is_url
from storage_specs.reader import DECODED_SHARDS_KEPT, Cache, open_cache

ROWS_AT_MOST = 2_000_000  # of a large cache, its first shards


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, and the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(**{name: float(np.percentile(values, q)) for name, q in (("median", 50), ("p10", 10), ("p90", 90))})


@dataclass(frozen=True, kw_only=True)
class ReaderFigures:
    """rows_per_second: verified and decoded to float32, all columns. gigabytes_per_second: sizes and crc32c of all
    objects. cold_ms, warm_ms: one document of a cache opened anew, without and with its files in the page cache; cold
    is None where the cache is no local folder, or the system has no posix_fadvise. peak_mib: of the process, over all
    this. stored_bytes: of the shards read.
    """

    cache: str
    store: str
    profile: str
    k: int
    k_ids: int
    rows: int
    stored_bytes: int
    rows_per_second: Spread
    gigabytes_per_second: Spread
    cold_ms: Spread | None
    warm_ms: Spread
    peak_mib: float
    decoded_shards_kept: int


def bench_reader(
    place: str | os.PathLike[str], *, ids: bool = True, repeats: int = 5, documents: int = 50
) -> ReaderFigures:
    """Measure a cache. Raises ConfigError (no rows), and what reading raises."""
    cache = open_cache(place, ids=ids)
    shards, rows = _first_shards(cache)
    if not rows:
        raise ConfigError(f"{place}: the cache has no rows to read")
    stored = [item for shard in shards for item in cache.reader.objects_of(shard)]
    stored_bytes = sum(item.size for item in stored)
    numbers = random.Random(0).choices([number for number in range(len(cache)) if cache.rows_D[number]], k=documents)
    decode = _rates(lambda: _decode(open_cache(place, ids=ids), shards), rows, repeats)
    check = _rates(lambda: cache.reader.objects.fetch_all(stored), stored_bytes / 1e9, repeats)
    warm = [_access(place, ids, number) for number in numbers]
    cold = None
    if not is_url(place) and hasattr(os, "posix_fadvise"):
        cold = [_access(place, ids, number, forget=Path(place)) for number in numbers]
    return ReaderFigures(
        cache=str(place),
        store=cache.manifest.store,
        profile=cache.manifest.codec["profile"],
        k=cache.manifest.k,
        k_ids=cache.manifest.k_ids if ids else 0,
        rows=rows,
        stored_bytes=stored_bytes,
        rows_per_second=decode,
        gigabytes_per_second=check,
        cold_ms=None if cold is None else Spread.of(cold),
        warm_ms=Spread.of(warm),
        peak_mib=_peak_mib(),
        decoded_shards_kept=DECODED_SHARDS_KEPT,
    )


def as_text(figures: ReaderFigures) -> str:
    """The figures as lines."""

    def spread(value: Spread | None, unit: str, scale: float = 1) -> str:
        if value is None:
            return "not measured: it takes a local folder and posix_fadvise"
        return f"{value.median * scale:.2f} {unit} ({value.p10 * scale:.2f} to {value.p90 * scale:.2f})"

    return "\n".join(
        [
            f"{figures.cache}: {figures.store}, {figures.profile}, k {figures.k}, ids of {figures.k_ids} ranks, "
            f"{figures.rows} rows in {figures.stored_bytes} bytes",
            f"  verified and decoded   {spread(figures.rows_per_second, 'million rows/s per core', 1e-6)}",
            f"  checksums              {spread(figures.gigabytes_per_second, 'GB/s per core')}",
            f"  one document, cold     {spread(figures.cold_ms, 'ms')}",
            f"  one document, warm     {spread(figures.warm_ms, 'ms')}",
            f"  peak memory            {figures.peak_mib:.0f} MiB; {figures.decoded_shards_kept} shards kept decoded",
        ]
    )


def _first_shards(cache: Cache) -> tuple[list[int], int]:
    """The shards to be read, and their rows."""
    shards, rows = [], 0
    for shard in range(len(cache.documents_per_shard)):
        if rows >= ROWS_AT_MOST:
            break
        shards.append(shard)
        rows += cache.table.size_of(shard).rows
    return shards, rows


def _decode(cache: Cache, shards: list[int]) -> None:
    for shard in shards:
        cache.columns(shard)


def _rates(work: Callable[[], object], amount: float, repeats: int) -> Spread:
    """What is done per second of processor time; the first time fills the page cache and does not count."""
    work()
    rates = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        rates.append(amount / (time.process_time() - started))
    return Spread.of(rates)


def _access(place: str | os.PathLike[str], ids: bool, number: int, forget: Path | None = None) -> float:
    """Milliseconds for one document of a cache that is open, but of which no shard was read."""
    cache = open_cache(place, ids=ids)
    if forget is not None:
        _forget(forget)
    started = time.perf_counter()
    _ = cache[number]
    return 1000 * (time.perf_counter() - started)


def _forget(folder: Path) -> None:
    """Ask the kernel to drop a folder's files from the page cache; they are clean, so it does."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 / (1024 if sys.platform == "darwin" else 1)

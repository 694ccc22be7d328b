"""What damaged files give back: our two stores in both reading modes, beside plain Zarr, Arrow IPC and Parquet.

    python scripts/flip_bits.py --flips 10000 [--output scripts/results/flips.csv]
    python scripts/flip_bits.py --flips 200 --output /dev/null      # a minute

Single-bit flips: half of them at offsets drawn evenly over all bytes, half over all regions (manifest, plan, tables,
vocabulary, records, metadata, chunks, indexes, footers), then over a region's bytes. Beside them objects cut, emptied,
deleted, padded, exchanged with another, taken from another build of the same corpus (as it is, and cut or padded to the
size that is expected), and blocks zeroed or exchanged inside an object. `silent` is what must not be: other values than
were written, and no error. Each of them is read by the real code; only what depends on the damaged object is read.
"""

import argparse
import csv
import os
import random
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import chain, islice, pairwise
from pathlib import Path

from damaged_caches import (
    DETECTED,
    ONE_BY_ONE,
    OUTCOMES,
    SILENT,
    UNAFFECTED,
    UNTYPED,
    WHOLE,
    MemoryObjects,
    OurCache,
    PlainFile,
    Subject,
    plain_arrays,
    plain_arrow,
    plain_zarr,
    some_cache,
)
from tqdm import tqdm

from storage_specs.reader import cache_of

CRASH = "crash"
BLOCK = 64  # bytes exchanged or zeroed inside an object
WORDS = 1500  # of each message: a shard has some 10,000 rows, several chunks and row groups
Damage = tuple[str, str, dict[str, bytes | None]]  # (kind, region, {name: new bytes, None = deleted})


def flips(subject: Subject, count: int, seed: int) -> Iterator[Damage]:
    """Single-bit flips over all bytes, and over all regions."""
    generator = random.Random(seed)
    names = sorted(subject.files)
    sizes = [len(subject.files[name]) for name in names]
    regions: dict[str, list[tuple[str, int]]] = {}
    for name, size in zip(names, sizes, strict=True):
        places = {0, size - 1, *(generator.randrange(size) for _ in range(min(size, 400)))} if size else ()
        for place in places:
            regions.setdefault(subject.region(name, place), []).append((name, place))
    labels = sorted(regions)
    for number in range(count):
        if number % 2:
            name = generator.choices(names, sizes)[0]
            place = generator.randrange(len(subject.files[name]))
        else:
            name, place = generator.choice(regions[labels[number // 2 % len(labels)]])
        data = bytearray(subject.files[name])
        data[place] ^= 1 << generator.randrange(8)
        yield "bit flip", subject.region(name, place), {name: bytes(data)}


def other_damage(subject: Subject, stale: dict[str, bytes], seed: int) -> Iterator[Damage]:
    """Every object damaged in every other way; what would change nothing is left out."""
    generator = random.Random(seed)
    names = sorted(subject.files)
    for name in names:
        data, other = subject.files[name], subject.files[generator.choice(names)]
        old = stale.get(name, b"")
        first, second = (generator.randrange(max(1, len(data) // BLOCK)) * BLOCK for _ in range(2))
        zeroed, exchanged = bytearray(data), bytearray(data)
        zeroed[first : first + BLOCK] = bytes(len(data[first : first + BLOCK]))
        one, two = data[first : first + BLOCK], data[second : second + BLOCK]
        if len(one) == len(two):
            exchanged[first : first + BLOCK], exchanged[second : second + BLOCK] = two, one
        damages: dict[str, bytes | None] = {
            "deleted": None,
            "emptied": b"",
            "truncated": data[: generator.randrange(max(1, len(data)))],
            "padded": data + b"\0",
            "of another build": old,
            "of another build, same size": old[: len(data)].ljust(len(data), b"\0"),
            "another object": other,
            "another object, same size": other[: len(data)].ljust(len(data), b"\0"),
            "block zeroed": bytes(zeroed),
            "blocks exchanged": bytes(exchanged),
        }
        for kind, bad in damages.items():
            if bad != data:
                yield kind, "any", {name: bad}
    sizes: dict[int, list[str]] = {}
    for name in names:
        sizes.setdefault(len(subject.files[name]), []).append(name)
    for alike in sizes.values():
        for name, other in pairwise(alike):
            one, two = subject.files[name], subject.files[other]
            if one != two:
                yield "objects of one size exchanged", "any", {name: two, other: one}


def damages_of(subject: Subject, stale: dict[str, bytes], count: int, seed: int) -> Iterator[Damage]:
    """All damage, made one by one: ten thousand copies of a file would fill the memory."""
    return chain(flips(subject, count, seed), other_damage(subject, stale, seed))


def tried(subject: Subject, damages: Iterable[Damage], shown: str) -> Counter:
    """{(kind, region, outcome): how often}."""
    counted: Counter = Counter()
    for kind, region, bad in tqdm(damages, desc=shown, disable=None):
        counted[kind, region, _outcome(subject, bad)] += 1
    return counted


def _outcome(subject: Subject, bad: dict[str, bytes | None]) -> str:
    files = {name: data for name, data in subject.files.items() if name not in bad}
    files |= {name: data for name, data in bad.items() if data is not None}
    return subject.outcome(files, set(bad))


def tried_apart(subject: Subject, damages: Callable[[], Iterator[Damage]], shown: str) -> Counter:
    """The same in child processes: a decoder that crashes on damaged bytes ends its child, and counts as a crash."""
    counted: Counter = Counter()
    kinds = [damage[:2] for damage in damages()]
    done = 0
    while done < len(kinds):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            for _, _, bad in tqdm(islice(damages(), done, None), desc=shown, disable=None):
                signal.alarm(60)
                os.write(writing, bytes([OUTCOMES.index(_outcome(subject, bad))]))
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            outcomes = pipe.read()
        os.waitpid(child, 0)
        for kind, outcome in zip(kinds[done:], outcomes, strict=False):
            counted[*kind, OUTCOMES[outcome]] += 1
        done += len(outcomes)
        if done < len(kinds):
            counted[*kinds[done], CRASH] += 1
            done += 1
    return counted


def our_caches(folder: Path, store: str, profile: str, words: int = WORDS) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """(a cache's files, those of another build of documents like them)."""
    return tuple(some_cache(folder / f"{store}-{profile}-{seed}", store, profile, seed, words) for seed in (0, 1))


def rows_of(subject: Subject, counted: Counter) -> list[dict[str, object]]:
    """A CSV row for every kind of damage and region."""
    versions = {f"{name}_version": version(name) for name in ("zarr", "numcodecs", "pyarrow", "numpy")}
    rows = []
    for kind, region in sorted({key[:2] for key in counted}):
        figures = {outcome: counted[kind, region, outcome] for outcome in (*OUTCOMES, CRASH)}
        trials = {"subject": subject.name, "mode": subject.mode, "damage": kind, "region": region}
        rows.append({**trials, "trials": sum(figures.values()), **figures, **versions})
    return rows


def as_text(rows: list[dict[str, object]]) -> str:
    """One line per subject, mode and kind of damage, over all regions."""
    lines = [f"{'':34}{'mode':15}{'damage':31}{'trials':>7}{'detected':>10}{'no effect':>10}{'silent':>8}{'other':>7}"]
    for key in dict.fromkeys((row["subject"], row["mode"], row["damage"]) for row in rows):
        members = [row for row in rows if (row["subject"], row["mode"], row["damage"]) == key]
        total = {name: sum(row[name] for row in members) for name in ("trials", *OUTCOMES, CRASH)}
        lines.append(
            f"{key[0]:34}{key[1]:15}{key[2]:31}{total['trials']:7}{total[DETECTED] / total['trials']:10.2%}"
            f"{total[UNAFFECTED]:10}{total[SILENT]:8}{total[UNTYPED] + total[CRASH]:7}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=10_000, help="of each subject and mode")
    parser.add_argument("--profile", default="compact", help="of our caches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "flips.csv")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        caches = {store: our_caches(Path(folder), store, arguments.profile) for store in ("zarr", "arrow")}
    arrays, stale_arrays = (plain_arrays(cache_of(MemoryObjects(files))) for files in caches["zarr"])
    for store, (files, stale) in caches.items():
        for mode in (WHOLE, ONE_BY_ONE):
            subject = OurCache(store, mode, files)
            damages = damages_of(subject, stale, arguments.flips, arguments.seed)
            rows += rows_of(subject, tried(subject, damages, f"{subject.name}, {mode}"))
    plain = {
        "Zarr, defaults": plain_zarr(crc32c=False),
        "Zarr, zstd + crc32c codec": plain_zarr(crc32c=True),
        "Arrow IPC": plain_arrow("ipc"),
        "Parquet, defaults": plain_arrow("parquet"),
        "Parquet, page checksums": plain_arrow("parquet+crc"),
    }
    for name, (write, read) in plain.items():
        subject = PlainFile(name, arrays, write, read)
        stale = write(stale_arrays)
        write(arrays)
        damages = partial(damages_of, subject, stale, arguments.flips, arguments.seed)
        rows += rows_of(subject, tried_apart(subject, damages, name))
    with arguments.output.open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(as_text(rows))


if __name__ == "__main__":
    main()

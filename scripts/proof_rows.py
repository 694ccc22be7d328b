"""The rows of scripts/results/proof.csv and the locks beside the work: what several processes share, killed or not."""

import csv
import fcntl
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from proof_grid import KEY, Row


def append_row(results: Path, row: dict[str, Any]) -> None:
    """One line more, in one write; whoever else appends waits. Raises ValueError for a file of other columns."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a+", encoding="utf8", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        names = next(csv.reader(text.splitlines()), list(row))
        if set(names) != set(row):
            raise ValueError(f"{results} has other columns ({set(names) ^ set(row)}): give another --results")
        writer = csv.DictWriter(file, names)
        if not text:
            writer.writeheader()
        elif not text.endswith("\n"):  # a torn line
            file.write("\n")
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})


def done_keys(rows: Sequence[Row]) -> set[tuple[str, ...]]:
    return {tuple(row[name] for name in KEY) for row in rows}


def lock_file(folder: Path, name: str) -> Path:
    """The file whose lock says that somebody is at work on this."""
    locks = folder / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return locks / "".join(letter if letter.isalnum() or letter in "-.+" else "_" for letter in name)


def claim(path: Path) -> TextIO | None:
    """The open file of a lock that this process now holds until it closes it, or dies; None where another has it."""
    file = path.open("a")
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    file.close()
    return None

"""A CSV under scripts/results that grows while a benchmark runs: a time limit loses nothing that was measured.

Every `write` puts the whole file in place at once, earlier runs' rows first, so that there is never half a row.
"""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class ResultTable:
    """The rows of earlier runs, and those of this one, which replace each other as it goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.earlier = read_rows(path)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """`rows`: all of this run so far. Columns that earlier rows lack stay empty there."""
        names = list(dict.fromkeys(name for row in [*self.earlier, *rows] for name in row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.path.with_suffix(".new")
        with whole.open("w", encoding="utf8", newline="") as file:
            table = csv.DictWriter(file, names, restval="", lineterminator="\n")
            table.writeheader()
            table.writerows([*self.earlier, *rows])
        os.replace(whole, self.path)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none where it is not there yet. A line that a full disk or a power cut tore is no row."""
    if not path.exists():
        return []
    with path.open(encoding="utf8", newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and None not in row]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as README.md has them."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

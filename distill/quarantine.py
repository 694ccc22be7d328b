"""Shards that broke while a run was reading them: what `--on_corrupt quarantine` lost, document by document."""

import json
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import Any

NAME = "quarantine.jsonl"
HELD_OUT = "quarantine_held_out.jsonl"  # what evaluations go without, from epoch 0 on: always the same documents


class Quarantine:
    """The shards that a run leaves out, kept in `quarantine.jsonl` of its output folder, a line for each.

    A line: {"shard", "epoch" (from which on its documents are missing), "error", "documents": [[doc_id, rows], ...]}.
    Batches are prepared ahead, also those of the next epoch: a run that is resumed in an earlier epoch than a line's
    reads that shard again for it. Held-out documents that evaluations go without are in a file of their own. Ranks
    append to one file, so two that met the same broken shard write its line twice.
    """

    def __init__(self, output_dir: Path, name: str = NAME) -> None:
        self.path = output_dir / name
        self._lock = Lock()
        self._lines: dict[int, dict[str, Any]] = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf8").splitlines():
                self._keep(json.loads(line))

    def covers(self, shard: int, epoch: int) -> bool:
        """Whether an epoch goes without a shard."""
        return shard in self._lines and epoch >= self._lines[shard]["epoch"]

    def add(self, shard: int, epoch: int, error: Exception, documents: Iterable[tuple[str, int]]) -> None:
        """Leave a shard out from now on; documents: id and rows of all that are lost to training."""
        line = {
            "shard": shard,
            "epoch": epoch,
            "error": f"{type(error).__name__}: {error}",
            "documents": [[doc_id, int(rows)] for doc_id, rows in documents],
        }
        with self._lock:
            self._keep(line)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf8") as file:  # one short write: whole lines, whoever else appends
                file.write(json.dumps(line) + "\n")

    def _keep(self, line: dict[str, Any]) -> None:
        known = self._lines.get(line["shard"])
        if known is None or line["epoch"] < known["epoch"]:
            self._lines[line["shard"]] = line

    def summary(self) -> dict[str, Any] | None:
        """{"file", "shards", "documents", "rows"} lost, or None."""
        if not self._lines:
            return None
        rows = [rows for line in self._lines.values() for _, rows in line["documents"]]
        return {"file": self.path.name, "shards": sorted(self._lines), "documents": len(rows), "rows": sum(rows)}

"""Twenty of the nightly kill trials (scripts/nightly_kills.py): SIGKILL in every phase of a real build, then resume."""

import os
import subprocess
import sys
from csv import DictReader
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("store", "seed"), [("zarr", 11), ("arrow", 12)])
def test_killed_builds_resume_to_the_same_bytes(store: str, seed: int, tmp_path: Path) -> None:
    """A process of its own: a fork of one in which other tests have started threads might hang."""
    command = [sys.executable, "scripts/nightly_kills.py", "--trials=10", f"--seed={seed}", f"--store={store}"]
    done = subprocess.run(
        [*command, "--teacher=tiny", "--output", str(tmp_path / "kills.csv")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "kills.csv").open(encoding="utf8") as file:
        rows = list(DictReader(file))
    hit = {row["phase_hit"]: int(row["trials"]) for row in rows}
    assert hit == dict.fromkeys(("plan", "score", "encode", "commit", "manifest"), 2) | {"between": 0, "none": 0}
    assert sum(int(row["resumed_identical"]) for row in rows) == 10
    assert sum(int(row["gc_runs"]) for row in rows) == 5

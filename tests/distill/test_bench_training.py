"""scripts/bench_training.py runs, and compares trainers that see the same loss on the same batches."""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bench_training


def test_tiny_bench(tmp_path, capsys):
    results = tmp_path / "training.csv"
    words = ["--tiny", "--turns", "1", "--steps", "3", "--warm_up", "2", "--results", str(results)]
    words += ["--arms", "ce+uld,ce+hybrid"]
    assert bench_training.main(words) == 0
    with results.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == ["stock", "ce", "ce+uld", "ce+hybrid"]
    assert all(float(row["median_ms"]) > 0 and int(row["steps"]) == 3 for row in rows)
    assert len({row["tokens_per_step"] for row in rows}) == 1
    assert float(rows[0]["of_stock"]) == float(rows[1]["of_ce"]) == 1
    assert [row["data_wait_p99"] == "" for row in rows] == [True] + [False] * (len(rows) - 1)
    assert all(0 <= float(row["data_wait_median"]) <= float(row["data_wait_p99"]) < 1 for row in rows[1:])
    assert "ce+uld" in capsys.readouterr().out

"""Training from S3: the same weights as from a folder, the store read once per host, whatever answers break."""

from pathlib import Path

import pytest
from object_stores import S3
from safetensors.torch import load_file

from distill.main import main
from storage_specs.copying import copy_cache


def command(cache: str, student_path: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        *("train", "--model_name_or_path", str(student_path), "--cache", cache, "--output_dir", str(output_dir)),
        *("--max_length", "48", "--per_device_train_batch_size", "4", "--max_steps", "6", "--learning_rate", "1e-2"),
        *("--mapped_weight", "0.5", "--save_strategy", "no", "--use_cpu", "--logging_steps", "1", *more),
    ]


def test_weights_are_those_of_a_folder(
    s3: S3, cache_path: Path, student_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3.url}/gemma"
    copy_cache(cache_path, url)
    assert main(command(str(cache_path), student_path, tmp_path / "folder")) == 0
    s3.proxy.requests.clear()
    for fault in (503, "reset", "truncate", "garble", "lose", "slow"):
        s3.proxy.fail(fault, method="GET", path="shards/")
    flags = ("--cache_dir", str(tmp_path / "disk"), "--cache_bytes", "100000000")
    assert main(command(url, student_path, tmp_path / "s3", *flags)) == 0
    assert not [fault for fault in s3.proxy.faults if fault.times]
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("folder", "s3"))
    assert expected.keys() == found.keys()
    assert all(bool((expected[name] == found[name]).all()) for name in expected)
    s3.proxy.requests.clear()
    monkeypatch.setenv("TEACH_ONCE_CACHE_DIR", str(tmp_path / "disk"))
    assert main(command(url, student_path, tmp_path / "again")) == 0
    assert s3.proxy.count("GET", "shards") == 0
    assert main(["evaluate", "--cache", url, "--model", f"s={tmp_path / 'again'}", "--max_length", "48"]) == 0
    assert main(["align-report", "--cache", url, "--student", str(student_path), "--max_length", "48"]) == 0
    assert s3.proxy.count("GET", "shards") == 0

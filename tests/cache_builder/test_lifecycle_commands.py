"""merge, convert and gc at the command line, on caches of a tiny teacher."""

from pathlib import Path

import pytest
from tiny_teacher import files_of, write_corpus

from cache_builder.main import main
from storage_specs.command_line import run
from storage_specs.reader import open_cache
from storage_specs.verification import verify_cache


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> list[Path]:
    """Two caches of one teacher."""
    folder = tmp_path_factory.mktemp("caches")
    outputs = []
    for name, texts in (("a", ["one two three", "four"]), ("b", ["five six", "seven"])):
        corpus = write_corpus(folder / f"{name}.jsonl", texts)
        command = ["build", "--teacher", str(teacher), "--corpus", str(corpus), "--output", str(folder / name)]
        assert main([*command, "--k", "8", "--documents-per-shard", "1", "--engine", "transformers"]) == 0
        outputs.append(folder / name)
    return outputs


def test_merge(caches: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", *map(str, caches), "--output", str(tmp_path / "merged")]) == 0
    manifest = open_cache(tmp_path / "merged").manifest
    assert f"4 documents, cache_id {manifest.cache_id}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        run(main, ["merge", str(caches[0]), str(caches[0]), "--output", str(tmp_path / "twice")])
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "--keep_duplicates" in captured.err
    assert captured.err.count("\n") == 1
    twice = ["merge", str(caches[0]), str(caches[0]), "--keep-duplicates", "--output", str(tmp_path / "twice")]
    assert main(twice) == 0
    assert len(open_cache(tmp_path / "twice")) == 4


def test_convert(caches: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(caches[0]), "--store", "arrow", "--output", str(tmp_path / "arrow")]) == 0
    assert "arrow store, cache_id" in capsys.readouterr().out
    assert verify_cache(tmp_path / "arrow").ok
    assert main(["convert", str(tmp_path / "arrow"), "--store", "zarr", "--output", str(tmp_path / "zarr")]) == 0
    assert files_of(tmp_path / "zarr") == files_of(caches[0])


def test_gc(caches: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    cache = caches[1]
    (cache / "shards/000007.parquet").write_bytes(b"orphan")
    assert main(["gc", str(cache), "--dry-run", "--grace", "0"]) == 0
    out = capsys.readouterr().out
    assert "would remove shards/000007.parquet (6 bytes)" in out
    assert "1 objects of 6 bytes would be removed" in out
    assert main(["gc", str(cache)]) == 0
    assert "spared shards/000007.parquet (6 bytes): younger than 3600 s" in capsys.readouterr().out
    assert main(["gc", str(cache), "--grace", "0"]) == 0
    assert "1 objects of 6 bytes removed" in capsys.readouterr().out
    assert verify_cache(cache).ok

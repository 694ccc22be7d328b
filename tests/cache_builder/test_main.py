"""The command `cache-builder`: flags, config files, exit codes, and what verify, inspect and finalize say."""

import json
import re
import sys
from pathlib import Path

import pytest
from tiny_teacher import VOCABULARY, write_corpus

from cache_builder.build_config import BuildConfig
from cache_builder.commands import build as build_command
from cache_builder.inspection import column_bytes
from cache_builder.main import main
from storage_specs.command_line import run
from storage_specs.errors import ConfigError, IncompleteCacheError, NotACacheError
from storage_specs.reader import open_cache


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> list[str]:
    corpus = write_corpus(
        tmp_path_factory.mktemp("sources") / "corpus.jsonl", ["one two three", "", "four five six seven"]
    )
    return ["--teacher", str(teacher), "--corpus", str(corpus), "--engine", "transformers"]


@pytest.fixture(scope="module", params=["zarr", "arrow"])
def cache(request: pytest.FixtureRequest, sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp(request.param) / "cache"
    flags = ["--store", request.param, "--documents-per-shard", "2", "--k=32", "--k_ids", "4"]
    assert main(["build", *sources, "--output", str(output), *flags]) == 0
    return output


def test_inspect_json_adds_up(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(cache), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    manifest = open_cache(cache).manifest
    assert facts["cache_id"] == manifest.cache_id
    assert facts["counts"] == manifest.counts
    codec = facts["codec"]
    assert codec["profile"] == "compact"
    assert (
        0 < codec["mean_l1_error"] <= codec["p99_l1_error"] <= codec["max_l1_error"] <= codec["bound_l1_error"] < 4e-3
    )
    assert (facts["k"], facts["k_ids"], facts["shards"]) == (32, 4, 2)
    assert facts["bytes"] == sum(file.stat().st_size for file in (cache / "shards").rglob("*") if file.is_file())
    assert facts["bytes_by_column"] == column_bytes(open_cache(cache))
    columns = facts["bytes_by_column"]
    assert {"steps_low", "steps_high", "gap", "length", "gold_steps", "text", "other"} <= columns.keys()
    assert facts["bytes_per_row"] == facts["bytes"] / manifest.counts["rows"]
    ids = columns["id_low"] + columns["id_high"] + columns["id_word_steps"]
    without = facts["bytes_per_row_without_ids"] * manifest.counts["rows"]
    assert without == pytest.approx(facts["bytes"] - ids, rel=1e-12)


def test_inspect_for_people(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(cache), "--rows", "2"]) == 0
    out = capsys.readouterr().out
    for expected in (
        "3 in 2 shards",
        "1 without rows",
        f"top 32 of {VOCABULARY:,}",
        "teacher    tiny, float32",
        "L1 error   mean",
        "steps_low",
        "without ids",
        "0:3-7",
        "nats",
    ):
        assert expected in out


def test_verify_says_good_and_then_what_is_wrong(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(cache)]) == 0
    assert "good" in capsys.readouterr().out
    victim = max(
        (file for file in (cache / "shards").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
    )
    data = victim.read_bytes()
    victim.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
    try:
        assert main(["verify", str(cache)]) == 2
        assert victim.name in capsys.readouterr().err
        assert main(["verify", "--fast", str(cache)]) == 0
    finally:
        victim.write_bytes(data)


def test_finalize_writes_the_same_manifest_again(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = (cache / "manifest.json").read_bytes()
    (cache / "manifest.json").unlink()
    with pytest.raises(IncompleteCacheError, match="cache-builder finalize"):
        main(["inspect", str(cache)])
    assert main(["finalize", str(cache)]) == 0
    assert (cache / "manifest.json").read_bytes() == manifest
    assert open_cache(cache).manifest.cache_id in capsys.readouterr().out


def test_a_config_file_sets_what_flags_override(sources: list[str], tmp_path: Path) -> None:
    (tmp_path / "build.yaml").write_text("k: 8\nmax-documents: 1\nstore: arrow\nchat_template_kwargs: '{\"a\": 1}'\n")
    flags = ["--config", str(tmp_path / "build.yaml"), "--store", "zarr", "--output", str(tmp_path / "cache")]
    assert main(["build", *sources, *flags]) == 0
    manifest = open_cache(tmp_path / "cache").manifest
    assert (manifest.k, manifest.k_ids, manifest.store, manifest.counts["documents"]) == (8, 8, "zarr", 1)


def test_every_field_of_the_config_is_a_flag() -> None:
    fields = set(BuildConfig.__dataclass_fields__) - {"engine_arguments"}
    assert build_command.parser().names() == fields


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["biuld"], "unknown command 'biuld'; did you mean 'build'?"),
        (["build", "--teacher", "t"], "required: --corpus, --output"),
        (["build", "--teacher", "t", "--corpus", "c", "--output", "o", "--k", "many"], "invalid int value: 'many'"),
        (["build", "--teacher", "t", "--corpus", "c", "--output", "o", "--chat_template_kwargs", "[1]"], "JSON object"),
        (["inspect", "a", "b"], "unexpected argument 'b'"),
        (["verify", "x", "--fats"], "unknown option 'fats'; did you mean 'fast'?"),
    ],
)
def test_wrong_commands_name_the_nearest_right_one(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        main(arguments)


def test_errors_are_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("verify", "inspect", "finalize"):
        with pytest.raises(SystemExit) as left:
            run(main, [command, str(tmp_path)])
        assert left.value.code == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        with pytest.raises(NotACacheError):
            main([command, str(tmp_path)])


def test_off_the_terminal_every_finished_shard_is_a_line(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not sys.stderr.isatty()
    command = ["build", *sources, "--output", str(tmp_path / "cache"), "--documents-per-shard", "2"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "tok/s" in captured.out
    lines = [line for line in captured.err.splitlines() if "tok/s" in line]
    assert [line.partition(":")[0] for line in lines] == ["shard 1 of 2", "shard 2 of 2"]
    assert all(re.fullmatch(r"shard \d of 2: [\d,]+ tokens, [\d,]+ tok/s", line) for line in lines)
    (tmp_path / "cache" / "manifest.json").unlink()
    (tmp_path / "cache" / "shards" / "000001.json").unlink()
    assert main(command) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == ["shard 2 of 2"]


def test_inspect_of_damaged_objects_is_a_typed_error(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim = max(
        (file for file in (cache / "shards").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
    )
    data = victim.read_bytes()
    damages = [data[:-7], b"", None]
    if victim.suffix == ".parquet":
        damages.append(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
    for damage in damages:
        victim.unlink() if damage is None else victim.write_bytes(damage)
        try:
            with pytest.raises(SystemExit) as left:
                run(main, ["inspect", str(cache)])
        finally:
            victim.write_bytes(data)
        assert left.value.code == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"error: {victim.relative_to(cache)}")
        assert ": expected" in captured.err
        assert captured.err.count("\n") == 1


def test_outputs_that_cannot_be_made_are_one_line(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ok.jsonl").touch()
    for output in (tmp_path / "ok.jsonl" / "x", Path("/proc/foo")):
        with pytest.raises(SystemExit) as left:
            run(main, ["build", *sources, "--output", str(output)])
        assert left.value.code == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"error: {output}: cannot be written")
        assert captured.err.count("\n") == 1

"""`cache-builder plan`: counts that the build then confirms, sizes, speeds, and the break-even by hand."""

import json
from pathlib import Path

import pytest
from tiny_teacher import write_corpus

from cache_builder import cost_sheet
from cache_builder.build_config import BuildConfig
from cache_builder.builder import build
from cache_builder.commands import build as build_command
from cache_builder.commands import plan as plan_command
from cache_builder.cost_sheet import break_even, bytes_per_row, probe, workload_of
from cache_builder.main import main
from cache_builder.preparation import prepare
from storage_specs.codecs import PROFILES
from storage_specs.errors import ConfigError

TEXTS = ["Bern is a city. " * 8, "", "日本語 😀", "Aare " * 30]


@pytest.fixture
def flags(teacher: Path, tmp_path: Path) -> list[str]:
    corpus = write_corpus(tmp_path / "corpus.jsonl", TEXTS)
    values = {"teacher": teacher, "corpus": corpus, "engine": "transformers", "max_model_len": 24, "window_overlap": 6}
    return [f"--{name}={value}" for name, value in {**values, "documents_per_shard": 2}.items()]


@pytest.fixture
def prompt_flags(teacher: Path, tmp_path: Path) -> list[str]:
    """One prompt, to be answered."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "one two three"}))
    corpus = ["--teacher", str(teacher), "--corpus", str(prompts), "--engine", "transformers"]
    return [*corpus, "--mode", "generate"]


def test_the_sheet_counts_what_the_build_then_does(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert main(["plan", *flags, "--tokens-per-second", "100", "--data-parallel-size", "2"]) == 0
    assert sorted(tmp_path.iterdir()) == before
    printed = capsys.readouterr().out
    names = ("teacher", "corpus", "engine", "max_model_len", "window_overlap", "documents_per_shard")
    values = dict(zip(names, (flag.partition("=")[2] for flag in flags), strict=True))
    values |= {name: int(values[name]) for name in names[3:]}
    config = BuildConfig(**values, output=tmp_path / "cache")
    prepared = prepare(config)
    work = workload_of(prepared, config.shards_of(prepared.plan))
    report = build(config)
    assert (work.documents, work.shards) == (4, 2)
    assert work.rows == report.manifest.counts["rows"]
    assert work.text_bytes == report.manifest.counts["text_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert (work.tokens, work.windows - 3) == (report.work.tokens, report.work.windows_cut)
    assert f"{work.tokens:,} to read, in {work.windows} windows" in printed
    assert f"rows        {work.rows:,}" in printed
    hours = work.tokens / 200 / 3600
    assert f"{hours:,.2f} hours, {2 * hours:,.2f} GPU-hours: 100 tokens per second (given), 2 replicas" in printed
    assert "cache / (live - read)" in printed
    assert "<- this build" in printed


def test_only_what_this_call_is_to_score_is_counted(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *flags, "--shard-range", "0:1"]) == 0
    assert capsys.readouterr().out.startswith("documents   2 in 1 shards, 128 bytes of text\n")
    assert main(["build", *flags, "--output", str(tmp_path / "old"), "--max_documents", "2"]) == 0
    capsys.readouterr()
    assert main(["plan", *flags, "--extend", str(tmp_path / "old")]) == 0
    assert capsys.readouterr().out.startswith("documents   2 in 1 shards, 164 bytes of text\n")


def test_without_a_speed_the_sheet_says_how_to_get_one(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *flags]) == 0
    assert "--probe 30" in capsys.readouterr().out.splitlines()[-1]


def test_the_probe_works_the_real_engine(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *flags, "--probe", "0.2"]) == 0
    assert "tokens per second (probed for about 0.2 s)" in capsys.readouterr().out
    asked: list[float] = []
    monkeypatch.setattr(cost_sheet, "probed", lambda prepared, seconds: asked.append(seconds) or 1.0)
    assert main(["plan", "--probe", *flags]) == 0
    assert asked == [30.0]


def test_the_probe_of_mode_generate_writes(prompt_flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *prompt_flags, "--max_tokens", "4", "--probe", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert "tokens per second (probed for about 0.2 s)" in printed
    assert "which captures nothing and writes anew" in printed


def test_the_probe_times_the_largest_batch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def ask(windows: list[None]) -> int:
        now[0] += 100 if now[0] == 0 else 1 + len(windows)
        return 10 * len(windows)

    monkeypatch.setattr(cost_sheet.time, "monotonic", lambda: now[0])
    assert probe(ask, [None] * 3, 20) == 4 * 10 / 5  # batches of 1, 2 and 4 windows take 2, 3 and 5 seconds
    with pytest.raises(ConfigError, match="nothing to probe with"):
        probe(ask, [], 20)


def test_break_even_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_sheet, "CAPTURE_RATIO", 0.8)
    monkeypatch.setattr(cost_sheet, "READ_BYTES_PER_SECOND", 10.0)
    # 1,000 tokens at 10 a second: 100 s to score, 80 s a live epoch; 300 bytes: 30 s to read. 2 epochs: 160 = 100 + 60
    assert break_even(1000, 300, 10) == pytest.approx(2.0)
    assert break_even(1000, 800, 10) is None


def test_bytes_of_every_profile() -> None:
    assert set(PROFILES) <= set(cost_sheet.VALUE_BYTES)
    assert bytes_per_row("exact", 64, 0) == 256 + 6
    assert bytes_per_row("exact", 128, 16) == 512 + 6 + 20
    assert bytes_per_row("sketch", 128, 0) == bytes_per_row("sketch", 16, 0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tokens_per_second", "0"], "tokens_per_second is 0.0"),
        (["--probe", "-1"], "probe is -1.0"),
        (["--probe", "inf"], "probe is inf"),
        (["--tokens_per_second", "inf"], "tokens_per_second is inf"),
        (["--probe", "3", "--tokens_per_second", "3"], "leave one out"),
        (["--tokens_per_secnd", "3"], "did you mean 'tokens_per_second'"),
    ],
)
def test_refusals(flags: list[str], more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["plan", *flags, *more])


def test_every_flag_of_build_is_one_of_plan() -> None:
    assert plan_command.parser().names() == build_command.parser().names() | {"tokens_per_second", "probe"}


def test_generate_counts_prompts_and_at_most_so_many_tokens(
    prompt_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *prompt_flags, "--n", "3", "--max_tokens", "10"]) == 0
    printed = capsys.readouterr().out
    assert "3 in 1 shards" in printed
    assert "at most 39 to read and write" in printed
    assert "at most 30 to keep" in printed

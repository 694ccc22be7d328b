"""The sheet in a report: every figure in its cell, what was not measured left empty, text escaped, machines named."""

import dataclasses
import json

import pytest

from distill.evaluation import evaluate as evaluation_module
from distill.evaluation.inference_benchmark import InferenceFigures, InferenceSettings, Spread
from distill.evaluation.report import read_report
from distill.evaluation.report_format import as_html, as_markdown, as_text, cells
from distill.evaluation.sheet import settings_of, sheet_of
from distill.evaluation.tasks import task_from
from distill.main import main
from storage_specs import open_cache
from storage_specs.errors import CacheMismatchError, ConfigError

SPREAD = Spread(median=1234.5, q1=1000.0, q3=2000.0)
FIGURES = InferenceFigures(
    parameters=134_515_008,
    parameters_without_embeddings=106_203_456,
    weights_bytes=269_060_552,
    peak_bytes=816_308_224,
    dtype="float32",
    bytes_per_token=4.028,
    first_token_ms=SPREAD,
    token_ms=SPREAD,
    prefill_tokens=SPREAD,
    prefill_bytes=SPREAD,
    decode_tokens=SPREAD,
    decode_bytes=SPREAD,
    batch_size=2,
    new_tokens=8,
    repeats=3,
)


def test_the_sheet_in_a_report(cache_path, student_path, tmp_path, monkeypatch, capsys):
    """Measured at last, on the same texts for all, the live teacher included, whose bits per byte are the cache's."""
    measured = []

    def recorded(path: str, settings: InferenceSettings) -> InferenceFigures:
        measured.append((path, settings))
        return FIGURES

    monkeypatch.setattr(evaluation_module, "measure_apart", recorded)
    models = ["--model", f"a|<b>={student_path}", "--teacher", str(student_path), "--sheet", "--max_length", "128"]
    paths = ["--output_file", str(tmp_path / "e.json"), "--table", str(tmp_path / "e.html")]
    assert main(["evaluate", "--cache", str(cache_path), *models, *paths]) == 0
    assert [path for path, _ in measured] == [str(student_path)] * 2
    (settings,) = {settings for _, settings in measured}
    assert settings.dtype == "float32"
    held_out = [document.text for document in open_cache(cache_path) if document.text.startswith(settings.texts[0])]
    assert len(held_out) == 1
    report = read_report(tmp_path / "e.json")
    assert list(report.models) == ["a|<b>", "teacher"]
    teacher = report.models["teacher"]
    assert teacher.model == str(student_path)
    assert teacher.metrics["bits_per_byte"].value < report.models["a|<b>"].metrics["bits_per_byte"].value
    assert json.loads(json.dumps(dataclasses.asdict(FIGURES))).items() <= teacher.sheet.items()
    names, rows = cells(report)
    assert names == ["model", "a|<b>", "teacher"]
    found = {label: values for label, *values in rows}
    assert found["parameters"][0] == f"{report.models['a|<b>'].parameters:,}"
    assert found["parameters without embeddings"] == ["106,203,456"] * 2
    assert found["weights on disk"][0] == "269.1 MB"
    assert found["peak memory"][0] == "816.3 MB"
    assert found["time to the first token, ms"][0] == "1,234.5 (1,000.0 to 2,000.0)"
    assert found["prefill, kB of text/s"][0] == "1.2 (1.0 to 2.0)"
    assert "bits_per_byte (bits/byte)" in found
    page = (tmp_path / "e.html").read_text()
    assert page == as_html(report, "Evaluation")
    assert "a|&lt;b&gt;" in page
    assert f"machine: {teacher.sheet['machine']['cpu']}" in page
    assert "a\\|<b>" in as_markdown(report)
    assert as_text(report) + "\n" == capsys.readouterr().out
    one_only = dataclasses.replace(
        report, models={**report.models, "teacher": dataclasses.replace(teacher, sheet=None)}
    )
    assert dict((label, values) for label, *values in cells(one_only)[1])["peak memory"] == ["816.3 MB", ""]


def test_texts_to_go_on_from():
    task = task_from(
        "t", [{"prompt": "ü" * 600, "answer": "x"}, {"messages": [{"role": "user", "content": "hi"}], "answer": "x"}]
    )
    settings = settings_of(task, [], "float32")
    assert settings.texts == ("ü" * 256, "hi")
    assert sheet_of(FIGURES, settings, {})["text_bytes"] == 514
    with pytest.raises(ConfigError, match="give one of them"):
        settings_of(None, [], "float32")


def test_a_teacher_of_another_cache(cache_path, student_path, monkeypatch):
    monkeypatch.setattr(evaluation_module, "_Student", lambda *_: pytest.fail("a model was loaded"))
    cache = open_cache(cache_path)
    cache.manifest.teacher["weights_digest"] = "0" * 64
    with pytest.raises(CacheMismatchError, match=r"--teacher .* was built with 0+ .tiny-teacher"):
        evaluation_module.evaluate(
            evaluation_module.Evaluation(models={"a": str(student_path)}, cache=cache, teacher=str(student_path))
        )
    with pytest.raises(ConfigError, match="by --teacher"):
        evaluation_module.Evaluation(models={"teacher": "x"}, teacher="y", cache=cache)

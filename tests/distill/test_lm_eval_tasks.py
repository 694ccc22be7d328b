"""lm-eval's tasks, by lm-eval: its figures against log-likelihoods that are computed here, and what cannot be run."""

import json
import math
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.evaluation.lm_eval_tasks import LmEvalTasks, _metrics, _quiet, lm_eval_metrics
from distill.evaluation.report import read_report
from distill.main import main
from storage_specs.errors import ConfigError, EvaluationError

CAPITALS = [("France", "Paris", "London"), ("Italy", "Rome", "Berlin"), ("Spain", "Madrid", "Bern")]
TEXT = "Zürich is not the capital of Switzerland, whatever people think. 😀"
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
metadata: {{version: 2.0}}
"""
CHOICE = """task: our_capitals
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_choice: "{{[right, wrong]}}"
doc_to_target: 0
metric_list: [{metric: acc}]
"""
ROLLING = """task: our_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tasks over local files."""
    path = tmp_path_factory.mktemp("tasks")
    rows = {
        "our_capitals": [{"country": c, "right": right, "wrong": wrong} for c, right, wrong in CAPITALS],
        "our_text": [{"text": TEXT}, {"text": TEXT * 2}],
    }
    for text in (CHOICE, ROLLING):
        name = text.partition("\n")[0].removeprefix("task: ")
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        common = COMMON.format(data=path / f"{name}.jsonl", cache=path / "cache")
        (path / f"{name}.yaml").write_text(text + common)
    return path


@pytest.fixture(scope="module")
def model(student_path):
    return AutoModelForCausalLM.from_pretrained(student_path, dtype=torch.float32).eval()


@torch.no_grad()
def naive(model, tokenizer, prompt_ids: list[int], text_ids: list[int]) -> float:
    """ln p(text | prompt) in fp64, one forward pass per token."""
    total, ids = 0.0, list(prompt_ids)
    for token in text_ids:
        total += model(torch.tensor([ids])).logits[0, -1].double().log_softmax(0)[token].item()
        ids.append(token)
    return total


def test_figures_are_those_of_naive_log_likelihoods(folder, model, smollm2_tokenizer, capfd):
    tasks = LmEvalTasks(["our_capitals", "our_text"], include_path=folder)
    found = tasks.evaluate(model, smollm2_tokenizer, batch_size=2)
    assert capfd.readouterr() == ("", "")

    def ids(text: str) -> list[int]:
        return smollm2_tokenizer(text, add_special_tokens=False).input_ids

    right = []
    for country, *cities in CAPITALS:
        prompt = ids(f"The capital of {country} is")
        likely = [naive(model, smollm2_tokenizer, prompt, ids(f" {city}")) for city in cities]
        right.append(likely[0] > likely[1])
    accuracy = found["our_capitals"]["metrics"]["acc"]
    assert accuracy["value"] == pytest.approx(sum(right) / 3)
    assert accuracy["stderr"] == pytest.approx(math.sqrt(accuracy["value"] * (1 - accuracy["value"]) / 2))
    assert accuracy["higher_is_better"]
    assert {key: found["our_capitals"][key] for key in ("documents", "num_fewshot", "version")} == {
        "documents": 3,
        "num_fewshot": 0,
        "version": 2.0,
    }
    start = [smollm2_tokenizer.bos_token_id]
    nats = [-naive(model, smollm2_tokenizer, start, ids(text)) for text in (TEXT, TEXT * 2)]
    bits = found["our_text"]["metrics"]["bits_per_byte"]
    assert bits["value"] == pytest.approx(sum(nats) / math.log(2) / (3 * len(TEXT.encode())), rel=1e-5)
    assert bits["stderr"] is None
    assert not bits["higher_is_better"]
    first = LmEvalTasks(["our_text"], include_path=folder, limit=1).evaluate(model, smollm2_tokenizer)
    assert first["our_text"]["documents"] == 1
    assert first["our_text"]["metrics"]["bits_per_byte"]["value"] != pytest.approx(bits["value"])


def test_too_little_memory_is_no_task_that_failed(folder, model, smollm2_tokenizer, monkeypatch):
    def forward(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        LmEvalTasks(["our_text"], include_path=folder, limit=1).evaluate(model, smollm2_tokenizer)


def test_in_a_report_and_taken_up_again(folder, student_path, tmp_path, monkeypatch):
    flags = ["evaluate", "--model", f"a={student_path}", "--model", f"b={student_path}", "--output_file"]
    flags += [
        str(tmp_path / "e.json"),
        "--lm_eval_tasks",
        "our_capitals,our_text",
        "--lm_eval_include_path",
        str(folder),
    ]
    asked, evaluate = [], LmEvalTasks.evaluate

    def interrupted(self, *model, **options):
        asked.append(self)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return evaluate(self, *model, **options)

    monkeypatch.setattr(LmEvalTasks, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(flags)
    assert main(flags) == 0
    assert len(asked) == 3
    report = read_report(tmp_path / "e.json")
    assert report.subjects["lm_eval"]["tasks"] == (
        "our_capitals 2.0 (3 documents, 0-shot); our_text 2.0 (2 documents, 0-shot)"
    )
    metrics = report.models["a"].metrics
    assert metrics == report.models["b"].metrics
    assert metrics["our_capitals/acc"].unit == "%"
    assert metrics["our_capitals/acc"].value == pytest.approx(100 * round(metrics["our_capitals/acc"].value * 0.03) / 3)
    assert metrics["our_capitals/acc"].standard_error > 1
    assert not metrics["our_text/bits_per_byte"].higher_is_better
    assert main(["check", "--baseline", str(tmp_path / "e.json"), "--report", str(tmp_path / "e.json")]) == 0
    assert [each.name for each in tmp_path.iterdir()] == ["e.json"]


def test_lm_evals_remarks_are_not_ours(capsys):
    with _quiet():
        print("bootstrapping for stddev: f1_score")
    assert capsys.readouterr() == ("", "")


def test_figures_that_are_no_numbers():
    one = {"documents": 2, "num_fewshot": 0, "version": 1}
    kept = _metrics({"alias": "t", "f1,none": 0.5, "f1_stderr,none": float("nan")}, {"f1": True})
    assert lm_eval_metrics({"t": one | {"metrics": kept}})["t/f1"].standard_error is None
    for value in (float("nan"), float("inf"), "N/A"):
        with pytest.raises(EvaluationError, match="t/word_perplexity is"):
            lm_eval_metrics({"t": one | {"metrics": _metrics({"word_perplexity,none": value}, {})}})


def test_tasks_that_cannot_be_run(folder, model, smollm2_tokenizer, tmp_path, monkeypatch):
    for error, tasks, options in (
        ("no task 'hellaswagg'; did you mean 'hellaswag'", ["our_text", "hellaswagg"], {"include_path": folder}),
        ("no such folder", ["our_text"], {"include_path": tmp_path / "none"}),
        ("each once", ["our_text", "our_text"], {"include_path": folder}),
        ("at least one", [], {}),
    ):
        with pytest.raises(ConfigError, match=error):
            LmEvalTasks(tasks, **options)
    broken = (folder / "our_text.yaml").read_text().replace(str(folder / "our_text.jsonl"), "nowhere.jsonl")
    (tmp_path / "broken.yaml").write_text(broken)
    with pytest.raises(ConfigError, match=r"our_text: lm-eval failed: .*nowhere\.jsonl"):
        LmEvalTasks(["our_text"], include_path=tmp_path).evaluate(model, smollm2_tokenizer)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r'pip install "teach-once\[eval\]"'):
        LmEvalTasks(["our_text"], include_path=folder)

"""`distill evaluate --task` and `distill check`: answers of tiny and real models, resumed, compared."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from forked import Held, distill
from task_assets import disfl_qa, split, write_task
from transformers import AutoModelForCausalLM, AutoTokenizer, BartConfig, BartForConditionalGeneration

from distill.evaluation.answering import Answer, Answering, answers, completed
from distill.evaluation.comparison import as_text, compared
from distill.evaluation.evaluate import Evaluation, evaluate
from distill.evaluation.partial import AnswerFile, kept_figures, kept_scores
from distill.evaluation.report import Metric, ModelReport, Report, read_report, write_report
from distill.evaluation.report_format import as_html, as_markdown
from distill.evaluation.tasks import task_from
from distill.main import main
from distill.scoring import Scores
from storage_specs.command_line import run
from storage_specs.errors import ConfigError, EvaluationError


@pytest.fixture(scope="module")
def questions(wiki_texts: list[str]) -> list[dict]:
    """Twelve prompts of unequal lengths, with what stands behind them as the answer."""
    cuts = [(text, 20 + 9 * n) for n, text in enumerate(wiki_texts[:12])]
    return [{"prompt": text[:cut], "answer": text[cut : cut + 30].strip() or "x"} for text, cut in cuts]


@pytest.fixture(scope="module")
def tiny(student_path):
    return AutoModelForCausalLM.from_pretrained(student_path, dtype=torch.float32).eval()


def said(model, tokenizer, task, how) -> dict[str, str]:
    return {one.id: one.text for batch in answers(model, tokenizer, task.examples, how) for one in batch}


def test_written_answers_are_greedy(tiny, smollm2_tokenizer, questions):
    """Whatever the batch, what one forward pass per token finds likeliest; stopped and cut as asked."""
    task = task_from("wiki", questions)
    how = Answering(max_new_tokens=6, batch_size=5)
    expected = {}
    for example in task.examples:
        ids = smollm2_tokenizer(example.prompt).input_ids
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(tiny(torch.tensor([ids])).logits[0, -1].argmax()))
        expected[example.id] = smollm2_tokenizer.decode(ids[-6:], skip_special_tokens=True).strip()
    assert said(tiny, smollm2_tokenizer, task, how) == expected
    whole = expected["3"]
    stop = whole[len(whole) // 2]
    cut = said(tiny, smollm2_tokenizer, task, replace(how, stop=(stop,)))
    assert cut == {name: text.partition(stop)[0].strip() for name, text in expected.items()}


def test_long_prompts_lose_their_beginning(tiny, smollm2_tokenizer, wiki_texts):
    text = " ".join(wiki_texts)[:4000]
    task = task_from("long", [{"prompt": text, "answer": "a"}])
    ((answer,),) = answers(tiny, smollm2_tokenizer, task.examples, Answering(max_new_tokens=10))
    ids = smollm2_tokenizer(text).input_ids
    assert answer.prompt_cut == len(ids) - (256 - 10)
    last = smollm2_tokenizer.decode(ids[-246:])
    ((same,),) = answers(
        tiny,
        smollm2_tokenizer,
        task_from("l", [{"prompt": last, "answer": "a"}]).examples,
        Answering(max_new_tokens=10),
    )
    assert same.text == answer.text
    with pytest.raises(ConfigError, match="max_new_tokens 256"):
        list(answers(tiny, smollm2_tokenizer, task.examples, Answering(max_new_tokens=256)))


def test_encoder_decoders_are_asked_as_they_were_trained(t5_tokenizer, questions):
    """The encoder reads the whole prompt with its EOS, its positions begin with the text, whatever the batch."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "decoder_start_token_id": 0}
    bart = BartForConditionalGeneration(
        BartConfig(vocab_size=len(t5_tokenizer), forced_eos_token_id=None, init_std=0.5, **sizes, **heads, **ids)
    ).eval()
    long = {"prompt": " ".join(one["prompt"] for one in questions), "answer": "x"}
    task = task_from("wiki", [*questions[:4], long])
    how = Answering(max_new_tokens=5, batch_size=5)
    for example in task.examples:
        encoder_ids = t5_tokenizer(example.prompt).input_ids
        assert encoder_ids[-1] == t5_tokenizer.eos_token_id
        read, written = torch.tensor([encoder_ids[-64:]]), [0]
        while len(written) < 6 and written[-1] != 1:
            with torch.no_grad():
                logits_TV = bart(input_ids=read, decoder_input_ids=torch.tensor([written])).logits[0]
            written.append(int(logits_TV[-1].argmax()))
        expected = t5_tokenizer.decode(written[1:], skip_special_tokens=True).strip()
        for batch_size in (1, 5):
            found = [
                one
                for batch in answers(bart, t5_tokenizer, task.examples, replace(how, batch_size=batch_size))
                for one in batch
                if one.id == example.id
            ]
            assert [one.text for one in found] == [expected]
            assert found[0].prompt_cut == max(0, len(encoder_ids) - 64)
    assert found[0].prompt_cut > 0


def test_choices_by_brute_force(tiny, smollm2_tokenizer, questions):
    rows = [
        {"prompt": one["prompt"].strip(), "answer": "no", "choices": ["yes", "no", "may be so"]} for one in questions
    ]
    task, how = task_from("picked", rows), Answering(batch_size=4, max_length=128)
    found = [one for batch in answers(tiny, smollm2_tokenizer, task.examples, how) for one in batch]
    assert {one.id for one in found} == {one.id for one in task.examples}
    for answer in found:
        example = next(one for one in task.examples if one.id == answer.id)
        for choice, nats in zip(example.choices, answer.nats, strict=True):
            before = smollm2_tokenizer(example.prompt).input_ids
            ids = smollm2_tokenizer(f"{example.prompt} {choice}").input_ids
            assert ids[: len(before)] == before
            with torch.no_grad():
                logprobs_TV = tiny(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            expected = -sum(logprobs_TV[t - 1, ids[t]].item() for t in range(len(before), len(ids)))
            assert nats == pytest.approx(expected, rel=1e-5)
        assert answer.text == example.choices[int(np.argmin(answer.nats))]


def test_chats(tiny, smollm2_tokenizer):
    turns = [{"role": "user", "content": "What is red?"}]
    task = task_from("chat", [{"messages": turns, "answer": "a colour"}])
    how = Answering(max_new_tokens=4)
    text = smollm2_tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    same = task_from("same", [{"prompt": text, "answer": "a colour"}])
    assert said(tiny, smollm2_tokenizer, task, how) == said(tiny, smollm2_tokenizer, same, how)
    assert completed(task.examples[0], "a colour").kind == "chat"
    bare = AutoTokenizer.from_pretrained(smollm2_tokenizer.name_or_path)
    bare.chat_template = None
    with pytest.raises(ConfigError, match="give --chat_template"):
        said(tiny, bare, task, how)


def test_an_evaluation_killed_and_resumed(student_path, questions, tmp_path):
    """SIGKILL while answers are being written: what was there is kept, the end is as of an uninterrupted one."""
    write_task(tmp_path / "task.jsonl", questions)
    flags = ["evaluate", "--task", str(tmp_path / "task.jsonl"), "--model", f"s={student_path}"]
    flags += ["--max_new_tokens", "24", "--batch_size", "1"]
    assert main([*flags, "--output_file", str(tmp_path / "whole.json")]) == 0
    resumed = tmp_path / "resumed.json"
    partial = tmp_path / "resumed.json.partial" / "s.jsonl"
    held = Held("distill.evaluation.partial:AnswerFile.add", 4)
    with distill([*flags, "--output_file", str(resumed)], tmp_path / "said", held) as process:
        held.wait_until_reached(process)
        process.kill()
        process.join()
    kept = partial.read_bytes()
    assert not resumed.exists()
    assert kept.count(b"\n") == 1 + 4
    partial.write_bytes(kept + b'{"id": "1", "te')  # as a power cut would leave it
    with pytest.raises(EvaluationError, match=r"unfinished work \(max_new_tokens 24, now 25\)"):
        main([*flags, "--max_new_tokens", "25", "--output_file", str(resumed)])
    partial.write_bytes(kept + b'{"id": "1"}\n')
    with pytest.raises(EvaluationError, match="is damaged"):
        main([*flags, "--output_file", str(resumed)])
    partial.write_bytes(kept + b'{"id": "1", "te')
    assert main([*flags, "--output_file", str(resumed)]) == 0
    assert read_report(resumed) == read_report(tmp_path / "whole.json")
    lines = [(tmp_path / f"{name}.json.predictions" / "s.jsonl").read_text() for name in ("whole", "resumed")]
    assert lines[0] == lines[1]
    assert not partial.parent.exists()


def test_a_report_of_a_cache_and_a_task(cache_path, student_path, questions, tmp_path, capsys):
    """One table; empty answers are told and score 0."""
    write_task(tmp_path / "task.jsonl", questions[:4])
    flags = ["evaluate", "--task", str(tmp_path / "task.jsonl"), "--cache", str(cache_path), "--max_length", "128"]
    flags += ["--model", f"<s>={student_path}", "--max_new_tokens", "2", "--max_examples", "3", "--max_documents", "1"]
    for end in ("md", "html"):
        report = tmp_path / "report.json"
        assert main([*flags, "--output_file", str(report), "--table", str(tmp_path / f"t.{end}")]) == 0
    found = read_report(report)
    assert list(found.models["<s>"].metrics) == ["bits_per_byte", "exact_match", "f1"]
    assert list(found.models["teacher"].metrics) == ["bits_per_byte"]
    assert found.subjects["task"]["examples"] == 3
    out = capsys.readouterr().out
    assert "bits_per_byte (bits/byte)" in out
    assert (tmp_path / "t.md").read_text().startswith("| model | parameters | bits_per_byte (bits/byte) |")
    page = (tmp_path / "t.html").read_text()
    assert "&lt;s&gt;" in page
    assert "<s>" not in page
    with pytest.raises(ConfigError, match=r"\.md or \.html"):
        main([*flags, "--table", str(tmp_path / "t.pdf")])
    silent = Report(
        subjects={}, models={"m": ModelReport(model="m", digest="d", parameters=1, metrics={}, notes=("2 of 3 empty",))}
    )
    assert "m: 2 of 3 empty" in as_markdown(silent)
    assert "m: 2 of 3 empty" in as_html(silent, "t")


def test_scores_are_made_once(tmp_path):
    """Of held-out text: kept whole, and never taken for those of another model."""
    columns = {"segment": [0, 1], "byte_start": [0, 3], "byte_end": [3, 5], "is_end": [False, True]}
    one = Scores(**{name: np.array(values) for name, values in columns.items()}, nats=np.array([0.5, 1.25]))
    empty = Scores(**{name: getattr(one, name)[:0] for name in Scores.__dataclass_fields__})
    path = tmp_path / "deep" / "m.npz"
    for make in (lambda: [one, empty], lambda: pytest.fail("made again")):
        found = kept_scores(path, {"digest": "d"}, make)
        for name in Scores.__dataclass_fields__:
            assert [getattr(scores, name).tolist() for scores in found] == [getattr(one, name).tolist(), []]
    with pytest.raises(EvaluationError, match="digest 'd', now 'e'"):
        kept_scores(path, {"digest": "e"}, lambda: [one])
    for damaged in (b"", b"PK", path.read_bytes()[:100], b"[]"):
        path.write_bytes(damaged)
        with pytest.raises(EvaluationError, match="is damaged"):
            kept_scores(path, {"digest": "d"}, lambda: [one])


def test_answers_are_never_written_again(tmp_path):
    """Only a last line that was cut off goes; a file of something else stays as it is."""
    path = tmp_path / "m.jsonl"
    file = AnswerFile(path, {"task": "t"})
    file.add([Answer(id="1", text="a\u2028b"), Answer(id="2", text="")])
    kept = path.read_bytes()
    path.write_bytes(kept + b'{"id"')
    node = path.stat().st_ino
    assert list(AnswerFile(path, {"task": "t"}).answers.values()) == list(file.answers.values())
    assert (path.read_bytes(), path.stat().st_ino) == (kept, node)
    for damaged in (b"[]\n", kept + b"[]\n", kept + b'{"id": "3", "text": null}\n', kept + b"{\n"):
        path.write_bytes(damaged)
        with pytest.raises(EvaluationError, match="is damaged"):
            AnswerFile(path, {"task": "t"})
        assert path.read_bytes() == damaged
    path.write_bytes(b'{"task"')  # killed while it was begun
    file = AnswerFile(path, {"task": "t"})
    assert (file.answers, path.read_bytes()) == ({}, b"")
    file.add([Answer(id="1", text="a\u2028b"), Answer(id="2", text="")])
    assert path.read_bytes() == kept
    for damaged in ("[]", "{}", "{"):
        path.write_text(damaged)
        with pytest.raises(EvaluationError, match="is damaged"):
            kept_figures(path, {"task": "t"}, dict)


def test_reports_that_are_none(tmp_path):
    path = tmp_path / "r.json"
    metric = Metric.of([50.0, 100.0], unit="%", higher_is_better=True)
    model = ModelReport(model="m", digest="d", parameters=10, metrics={"f1": metric})
    write_report(path, Report(subjects={"task": {"name": "t", "digest": "x"}}, models={"m": model}))
    assert read_report(path).models["m"] == model
    good = json.loads(path.read_text())

    def with_metric(**changes):
        values = json.loads(json.dumps(good))
        values["models"]["m"]["metrics"]["f1"] |= changes
        return json.dumps(values)

    for values, match in (
        ("{", "not JSON"),
        ("[]", "not a report"),
        (json.dumps(good | {"format": "x"}), "not a report"),
        (json.dumps(good | {"version": 2}), "version 2"),
        (json.dumps({**good, "models": {"m": {}}}), "damaged"),
        ("[" * 100_000, "not JSON"),
        (with_metric(value=None), "damaged"),
        (with_metric(standard_error="x"), "damaged"),
        (with_metric(scores=[1.0, float("nan")]), "damaged"),
        (with_metric(unit=None), "damaged"),
        (with_metric(higher_is_better="yes"), "damaged"),
        (with_metric(more=1), "damaged"),
    ):
        path.write_text(values)
        with pytest.raises(EvaluationError, match=match):
            read_report(path)
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_report(tmp_path / "none.json")


def reports(before: list[float], after: list[float], **more) -> tuple[Report, Report]:
    options = {"unit": "%", "higher_is_better": True} | more
    models = [
        ModelReport(model="m", digest=None, parameters=1, metrics={"x": Metric.of(s, **options)})
        for s in (before, after)
    ]
    return tuple(Report(subjects={"task": {"name": "t", "digest": "d"}}, models={"m": one}) for one in models)


@pytest.mark.parametrize(
    ("before", "after", "more", "drop", "verdict"),
    [
        ([50, 50, 50, 50], [48, 48, 48, 48], {}, 2.0, "FELL"),
        ([0, 100] * 8, [0, 100] * 7 + [0, 0], {}, 6.25, "FELL, within the noise"),
        ([50, 52], [49.5, 51.5], {}, 0.5, "worse, but allowed"),
        ([50, 50], [60, 60], {}, -10.0, "better"),
        ([2.0, 2.0], [2.1, 2.1], {"unit": "bits/byte", "higher_is_better": False}, 5.0, "FELL"),
        ([2.0, 2.0], [1.9, 1.9], {"unit": "bits/byte", "higher_is_better": False}, -5.0, "better"),
        ([3.0], [3.0], {}, 0.0, "same, noise not known"),
    ],
)
def test_check(before, after, more, drop, verdict):
    (change,) = compared(*reports(before, after, **more), max_drop=1.0)
    assert change.drop == pytest.approx(drop)
    assert change.verdict == verdict
    assert change.failed == verdict.startswith("FELL")
    assert verdict in as_text([change], 1.0)


def test_check_command(tmp_path, capsys):
    before, after = reports([50.0, 60.0], [47.0, 57.0])
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, report in zip(paths, (before, after), strict=True):
        write_report(path, report)
    flags = ["check", "--baseline", str(paths[0]), "--report", str(paths[1])]
    assert main([*flags, "--max-drop", "1.0"]) == 1
    assert "1 of 1 fell by more than 1" in capsys.readouterr().out
    assert main([*flags, "--max-drop", "3.5"]) == 0
    assert capsys.readouterr().err == ""
    write_report(paths[1], replace(after, dtype="bfloat16"))
    assert main([*flags, "--max-drop", "3.5"]) == 0
    assert "now in bfloat16: small changes may come from rounding" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="max_drop"):
        main([*flags, "--max-drop", "nan"])
    (model,) = after.models.values()
    for other, match in (
        (
            replace(after, subjects={"task": {"name": "u", "digest": "e"}}),
            "task: name 't', now 'u'; digest 'd', now 'e'",
        ),
        (replace(after, subjects={"cache": {"cache_id": "c"}}), "measured: subjects ['task'], now ['cache']"),
        (
            replace(after, subjects={"task": {"name": "t", "digest": "d", "chat_template_kwargs": {"thinking": True}}}),
            "task: chat_template_kwargs None, now {'thinking': True}",
        ),
        (replace(after, models={"n": model}), "other models: m, now n"),
        (replace(after, models={"m": replace(model, parameters=2)}), "model m: parameters 1, now 2"),
        (
            replace(after, models={"m": replace(model, metrics={"x": replace(model.metrics["x"], unit="nats")})}),
            "x of m: unit '%', now 'nats'",
        ),
        (replace(after, models={"m": replace(model, metrics={})}), "other metrics of m: x, now none"),
    ):
        write_report(paths[1], other)
        with pytest.raises(SystemExit) as left:
            run(main, flags)
        assert left.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert match in error


def test_a_real_model_answers_real_questions(smollm2_path, tmp_path):
    """SmolLM2-135M-Instruct on Disfl-QA: spans that it was never trained on, a few of which it finds."""
    train, test = split(disfl_qa())
    assert not {one["group"] for one in train} & {one["group"] for one in test}
    short = sorted(test, key=lambda one: len(one["prompt"]))[:6]
    task = task_from("disfl_qa", short)
    how = Answering(max_new_tokens=8, stop=("\n",), batch_size=6)
    report = evaluate(Evaluation(models={"smollm2": str(smollm2_path)}, task=task, how=how), tmp_path / "r.json")
    metrics = report.models["smollm2"].metrics
    assert 10 < metrics["f1"].value < 100
    assert metrics["f1"].value >= metrics["exact_match"].value
    assert report.models["smollm2"].parameters == 134_515_008

"""Held-out bits per byte: against brute force, and the same bytes for every tokenizer."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cache_making import tiny_student
from transformers import AutoModelForCausalLM

from distill.evaluation.answering import Answering, answers
from distill.evaluation.bits_per_byte import bits_per_byte
from distill.evaluation.evaluate import Evaluation, evaluate, usual_dtype
from distill.evaluation.report import read_report
from distill.evaluation.report_format import as_text
from distill.evaluation.tasks import Example
from distill.scoring import Scores, score, shared_regions, summed, teacher_scores
from storage_specs import chat_document, completion_document, is_held_out, open_cache, render, text_document
from storage_specs.errors import AlignmentError, ConfigError, NonFiniteLossError


def brute_force_nats(model, tokenizer, document) -> dict[int, tuple[int, int, float]]:
    """{token index: (byte_start, byte_end, nats)} of scored tokens, one forward pass per predicted token."""
    sequence = render(tokenizer, document)
    ids = [*sequence.prefix_ids.tolist(), *sequence.ids.tolist()]
    offset = len(sequence.prefix_ids)
    found = {}
    for t in np.flatnonzero(sequence.scored & ~sequence.is_end).tolist():
        if offset + t == 0:
            continue
        with torch.no_grad():
            logits_V = model(torch.tensor([ids[: offset + t]])).logits[0, -1].double()
        nats = -logits_V.log_softmax(0)[ids[offset + t]].item()
        found[t] = (int(sequence.byte_start[t]), int(sequence.byte_end[t]), nats)
    return found


@pytest.fixture(scope="module")
def small(wiki_texts):
    return [text_document(wiki_texts[0][:70]), completion_document(wiki_texts[1][:30], wiki_texts[1][30:90])]


def test_scores_are_brute_force(small, student_path, smollm2_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(student_path, dtype=torch.float32).eval()
    whole = score(model, smollm2_tokenizer, small, max_length=256)
    for document, scores in zip(small, whole, strict=True):
        expected = brute_force_nats(model, smollm2_tokenizer, document)
        content = ~scores.is_end
        assert scores.byte_start[content].tolist() == [start for start, _, _ in expected.values()]
        assert scores.byte_end[content].tolist() == [end for _, end, _ in expected.values()]
        np.testing.assert_allclose(scores.nats[content], [nats for _, _, nats in expected.values()], rtol=1e-4)
    # Cut into windows nothing is lost, and the batch's shape changes nothing.
    for batch_size in (1, 5):
        for a, b in zip(
            whole, score(model, smollm2_tokenizer, small, max_length=12, batch_size=batch_size), strict=True
        ):
            assert a.byte_end.tolist() == b.byte_end.tolist()
            assert a.is_end.tolist() == b.is_end.tolist()


def test_a_model_that_says_nan_has_no_figures_and_picks_no_answer(small, student_path, smollm2_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(student_path, dtype=torch.float32).eval()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NonFiniteLossError, match="no finite number"):
        score(model, smollm2_tokenizer, small, max_length=256)
    question = Example(id="1", prompt="Is it?", references=("yes",), choices=("yes", "no"))
    with pytest.raises(NonFiniteLossError, match="no finite number"):
        list(answers(model, smollm2_tokenizer, [question], Answering(max_length=256)))


def test_figures_are_brute_force(small, student_path, smollm2_tokenizer, gemma_tokenizer, tmp_path):
    """Two students with different tokenizers and a faked teacher: sums over the bytes that all three score."""
    students = {
        "smol": (AutoModelForCausalLM.from_pretrained(student_path, dtype=torch.float32).eval(), smollm2_tokenizer),
        "gemma": (
            AutoModelForCausalLM.from_pretrained(
                tiny_student(tmp_path / "g", gemma_tokenizer), dtype=torch.float32
            ).eval(),
            gemma_tokenizer,
        ),
    }
    scores = {name: score(model, tokenizer, small, max_length=256) for name, (model, tokenizer) in students.items()}
    late = [  # a teacher that starts late
        {name: getattr(one, name)[2:] for name in ("segment", "byte_start", "byte_end", "is_end")}
        | {"gold_logprob": -np.arange(len(one.nats), dtype=np.float64)[2:]}
        for one in scores["gemma"]
    ]
    held_out = [SimpleNamespace(**columns) for columns in late]
    found, counts = bits_per_byte(held_out, scores)
    scores["teacher"] = [teacher_scores(document) for document in held_out]
    nats, size, each = dict.fromkeys(scores, 0.0), 0, []
    for number, document in enumerate(small):
        tokens = {name: list(brute_force_nats(*students[name], document).values()) for name in students}
        late = scores["teacher"][number]
        rows = zip(late.byte_start, late.byte_end, late.nats, late.is_end, strict=True)
        tokens["teacher"] = [(int(start), int(end), float(nats)) for start, end, nats, is_end in rows if not is_end]
        places = [{place for start, end, _ in rows for place in (start, end)} for rows in tokens.values()]
        latest = max(rows[0][0] for rows in tokens.values())
        shared = sorted(place for place in set.intersection(*places) if place >= latest)
        each.append(shared[-1] - shared[0])
        for name, rows in tokens.items():
            nats[name] += sum(n for start, end, n in rows if start >= shared[0] and end <= shared[-1])
    size = sum(each)
    assert size > 100
    assert counts == {"documents": 2, "bytes": size}
    assert list(found) == ["smol", "gemma", "teacher"]
    for name, metric in found.items():
        assert metric.value == pytest.approx(nats[name] / math.log(2) / size, rel=1e-4)
        assert metric.weights == tuple(each)
        assert (metric.unit, metric.higher_is_better) == ("bits/byte", False)


def scores_of(rows, nats=None):
    columns = np.array([row[:3] for row in rows], dtype=np.int64).reshape(-1, 3).T
    return Scores(
        segment=columns[0],
        byte_start=columns[1],
        byte_end=columns[2],
        is_end=np.array([row[3] for row in rows], dtype=bool),
        nats=np.ones(len(rows)) if nats is None else np.array(nats, dtype=np.float64),
    )


def test_regions_and_what_belongs_to_them():
    # Segment 1: b ends early and starts late; segment 3 is b's alone; end rows never count.
    a = scores_of(
        [(1, 5, 5, False), (1, 5, 7, False), (1, 7, 9, False), (1, 9, 12, False), (1, 12, 12, True)], [8, 1, 2, 4, 99]
    )
    b = scores_of([(1, 7, 8, False), (1, 8, 9, False), (1, 9, 11, False), (3, 20, 25, False)], [1, 1, 1, 1])
    assert shared_regions([a, b]) == [(1, 7, 9)]
    sums = summed({"a": [a], "b": [b]})
    assert (sums.nats, sums.bytes, sums.documents) == ({"a": 2, "b": 2}, 2, 1)
    # An invented token in front of the first token is paid for; one behind the place where a region starts is not.
    sums = summed({"a": [a], "c": [a]})
    assert (sums.nats["a"], sums.bytes) == (15, 7)
    apart = scores_of([(3, 20, 25, False)])
    assert summed({"a": [a], "b": [apart]}).documents == 0
    teacher = SimpleNamespace(**vars(apart) | {"gold_logprob": -apart.nats})
    with pytest.raises(AlignmentError, match="not one byte"):
        bits_per_byte([teacher], {"a": [a]})


def test_evaluate_a_cache(cache_path, student_path, tmp_path):
    cache = open_cache(cache_path)
    held_out = [document for document in cache if is_held_out(document.doc_id) and len(document.segment)]
    assert held_out
    models = {"before": str(student_path), "after": str(student_path)}
    report = evaluate(
        Evaluation(models=models, cache=cache, how=Answering(max_length=128)), tmp_path / "deep" / "e.json"
    )
    assert read_report(tmp_path / "deep" / "e.json") == report
    assert list(report.models) == ["before", "after", "teacher"]
    assert report.models["before"] == report.models["after"]
    assert report.models["before"].parameters == AutoModelForCausalLM.from_pretrained(student_path).num_parameters()
    facts = report.subjects["cache"]
    assert (facts["cache_id"], facts["documents"]) == (cache.manifest.cache_id, len(held_out))
    assert 0 < facts["bytes"] <= sum(len(document.text.encode()) for document in held_out)
    # An untrained model of 49,152 words: nearly uniform over them.
    before, teacher = (report.models[name].metrics["bits_per_byte"].value for name in ("before", "teacher"))
    assert before > teacher > 0
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["e.json"]
    assert as_text(report).count("\n") == 5
    assert "models: weights in float32" in as_text(report)


def test_weights_are_rounded_where_a_gpu_would_and_the_report_says_so(cache_path, student_path, tmp_path, monkeypatch):
    def bits(output: str, **more: str) -> float:
        found = evaluate(
            Evaluation(
                models={"s": str(student_path)},
                cache=open_cache(cache_path),
                max_documents=2,
                how=Answering(max_length=128),
                **more,
            ),
            tmp_path / output,
        )
        assert found.dtype == more.get("dtype", "float32")
        return found.models["s"].metrics["bits_per_byte"].value

    exact, rounded = bits("exact.json"), bits("rounded.json", dtype="bfloat16")
    assert 0 < abs(rounded - exact) < 0.01 * exact
    assert usual_dtype() == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert usual_dtype() == "bfloat16"


def test_what_cannot_be_evaluated(cache_path, student_path, tmp_path):
    def refused(error, match, **more):
        with pytest.raises(error, match=match):
            evaluate(Evaluation(**{"models": {"x": str(student_path)}, "cache": open_cache(cache_path)} | more))

    refused(ConfigError, "at most 256", how=Answering(max_length=1024))
    refused(ConfigError, "cannot be", models={"x": str(tmp_path / "nothing")})
    refused(AlignmentError, "held-out", max_documents=0)
    refused(ConfigError, "nothing to evaluate on", cache=None)
    refused(ConfigError, "teacher", models={"teacher": str(student_path)})
    refused(ConfigError, "named so", models={"a/b": str(student_path)})


def test_a_chat_template_given_is_every_models(wiki_texts, student_path, smollm2_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(student_path, dtype=torch.float32).eval()
    question, answer = wiki_texts[0][:40].strip(), wiki_texts[0][40:80].strip()
    chat = chat_document([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    template = "{{ greeting }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    nats = [
        score(model, smollm2_tokenizer, [chat], max_length=128, **options)[0].nats
        for options in (
            {},
            {"chat_template": template},
            {"chat_template": template, "chat_template_kwargs": {"greeting": "Hello! "}},
        )
    ]
    assert not np.array_equal(nats[0], nats[1])
    assert not np.array_equal(nats[1], nats[2])

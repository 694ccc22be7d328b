"""Held-out bits per byte: against brute force, and the same bytes for every tokenizer."""

import json
import math

import numpy as np
import pytest
import torch
from cache_making import tiny_student
from transformers import AutoModelForCausalLM

from distill.evaluate import evaluate, figures, table, write_figures
from distill.scoring import Scores, score, shared_regions, teacher_scores
from storage_specs import chat_document, completion_document, is_held_out, open_cache, render, text_document
from storage_specs.errors import AlignmentError, ConfigError


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
    scores["teacher"] = [
        Scores(
            segment=one.segment[2:],  # a teacher that starts late
            byte_start=one.byte_start[2:],
            byte_end=one.byte_end[2:],
            is_end=one.is_end[2:],
            nats=np.arange(len(one.nats), dtype=np.float64)[2:],
        )
        for one in scores["gemma"]
    ]
    found = figures(scores, "id")
    nats, size = dict.fromkeys(scores, 0.0), 0
    for number, document in enumerate(small):
        tokens = {name: list(brute_force_nats(*students[name], document).values()) for name in students}
        late = scores["teacher"][number]
        rows = zip(late.byte_start, late.byte_end, late.nats, late.is_end, strict=True)
        tokens["teacher"] = [(int(start), int(end), float(nats)) for start, end, nats, is_end in rows if not is_end]
        places = [{place for start, end, _ in rows for place in (start, end)} for rows in tokens.values()]
        latest = max(rows[0][0] for rows in tokens.values())
        shared = sorted(place for place in set.intersection(*places) if place >= latest)
        size += shared[-1] - shared[0]
        for name, rows in tokens.items():
            nats[name] += sum(n for start, end, n in rows if start >= shared[0] and end <= shared[-1])
    assert size > 100
    for name, row in found.items():
        assert row["bytes"] == size
        assert row["documents"] == 2
        assert row["bits_per_byte"] == pytest.approx(nats[name] / math.log(2) / size, rel=1e-4)


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
    rows = figures({"a": [a], "b": [b]}, "id")
    assert rows["a"] == {"bits_per_byte": 2 / math.log(2) / 2, "documents": 1, "bytes": 2, "cache_id": "id"}
    assert rows["b"]["bits_per_byte"] == 2 / math.log(2) / 2
    # An invented token in front of the first token is paid for; one behind the place where a region starts is not.
    assert figures({"a": [a], "c": [a]}, "id")["a"]["bits_per_byte"] == pytest.approx(15 / math.log(2) / 7)
    with pytest.raises(AlignmentError, match="not one byte"):
        figures({"a": [a], "b": [scores_of([(3, 20, 25, False)])]}, "id")


def test_evaluate_a_cache(cache_path, student_path, tmp_path):
    cache = open_cache(cache_path)
    held_out = [document for document in cache if is_held_out(document.doc_id) and len(document.segment)]
    assert held_out
    found = evaluate(cache_path, {"before": str(student_path), "after": str(student_path)}, max_length=128)
    assert list(found) == ["before", "after", "teacher"]
    assert found["before"] == found["after"]
    assert found["teacher"]["cache_id"] == cache.manifest.cache_id
    assert found["teacher"]["documents"] == len(held_out)
    # An untrained model of 49,152 words: nearly uniform over them.
    assert found["before"]["bits_per_byte"] > found["teacher"]["bits_per_byte"] > 0
    covered = sum(len(teacher_scores(document).nats) for document in held_out)
    assert 0 < found["teacher"]["bytes"] <= sum(len(document.text.encode()) for document in held_out)
    assert covered > 0
    write_figures(tmp_path / "deep" / "evaluation.json", found)
    assert json.loads((tmp_path / "deep" / "evaluation.json").read_text()) == found
    assert table(found).count("\n") == 4


def test_what_cannot_be_evaluated(cache_path, student_path, tmp_path):
    with pytest.raises(ConfigError, match="at most 256"):
        evaluate(cache_path, {"x": str(student_path)}, max_length=1024)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        evaluate(cache_path, {"x": str(tmp_path / "nothing")})
    with pytest.raises(AlignmentError, match="held-out"):
        evaluate(cache_path, {"x": str(student_path)}, max_documents=0)


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

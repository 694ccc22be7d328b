"""Metrics of answers against naive references; task files that are and are not tasks."""

import json
import math
import random
import re

import numpy as np
import pytest

from distill.evaluation.metrics import chosen_metrics, exact_match, normalized, task_metrics, token_f1
from distill.evaluation.report import Metric, paired_error
from distill.evaluation.tasks import read_task, task_from
from storage_specs.errors import ConfigError, EvaluationError

WORDS = ["The", "a", "cat", "cat's", "sat,", "on", "MAT", "an", "(old)", "mat.", "theatre", "1984", "–"]


def naive_words(text: str) -> list[str]:
    """SQuAD's normalisation step by step: lower, punctuation, articles, white space."""
    kept = "".join(letter for letter in text.lower() if letter not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    return [word for word in re.split(r"\s+", kept) if word and word not in ("a", "an", "the")]


def naive_f1(prediction: str, reference: str) -> float:
    found, right = naive_words(prediction), naive_words(reference)
    left, common = list(right), 0
    for word in found:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(right)
    return 2 * precision * recall / (precision + recall)


def naive_lcs(one: list[str], other: list[str]) -> int:
    lengths = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            lengths[i + 1, j + 1] = lengths[i, j] + 1 if a == b else max(lengths[i, j + 1], lengths[i + 1, j])
    return int(lengths[-1, -1])


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1, 1),
        ("in 1984", "1984", 0, 2 / 3),
        ("", "yes", 0, 0),
        ("the", "a", 1, 0),  # nothing is left of either: SQuAD 1.1 finds no common word
        ("cat cat dog", "cat dog dog", 0, 2 / 3),
        ("anthem", "them", 0, 0),
        ("Beyoncé's", "Beyoncés", 1, 1),
    ],
)
def test_squad_by_hand(prediction, reference, exact, f1):
    assert exact_match(prediction, reference) == exact
    assert token_f1(prediction, reference) == pytest.approx(f1)


def test_squad_against_a_naive_reference():
    chance = random.Random(0)
    for _ in range(500):
        one, other = (" ".join(chance.choices(WORDS, k=chance.randint(0, 8))) for _ in range(2))
        assert normalized(one).split() == naive_words(one)
        assert token_f1(one, other) == pytest.approx(naive_f1(one, other), abs=1e-12)
        assert exact_match(one, other) == float(naive_words(one) == naive_words(other))


def test_rouge_is_f_measure_and_the_best_reference_counts():
    plain = ["bird", "cloud", "green", "north", "seven", "blue"]  # no suffix for a stemmer
    chance = random.Random(1)
    for _ in range(40):
        said, *right = ([*chance.choices(plain, k=chance.randint(1, 9))] for _ in range(3))
        task = task_from("t", [{"prompt": "p", "references": [" ".join(words) for words in right]}])
        found = task_metrics(task, {"1": " ".join(said)}, ["rouge1", "rougeL"])

        def best(common, said=said, right=right):
            return max(200 * common(said, words) / (len(said) + len(words)) for words in right)

        shared = best(lambda a, b: sum(min(a.count(w), b.count(w)) for w in set(a)))
        assert found["rouge1"].value == pytest.approx(shared)
        assert found["rougeL"].value == pytest.approx(best(naive_lcs))


def test_metrics_of_a_task():
    rows = [{"prompt": "p", "references": ["Paris", "the city of Paris"]}, {"prompt": "q", "answer": "red"}]
    task = task_from("cities", rows)
    assert chosen_metrics(task, []) == ["exact_match", "f1"]
    found = task_metrics(task, {"1": "city of Paris", "2": ""}, ["exact_match", "f1"])
    assert found["exact_match"].scores == (100, 0)
    assert found["f1"].value == 50
    assert found["f1"].standard_error == pytest.approx(np.std([100, 0], ddof=1) / math.sqrt(2))
    article = task_from("article", [{"prompt": "p", "answer": "The"}])
    for said, score in (("the", 100), ("", 0), (" ", 0)):  # SQuAD would take nothing for an article
        assert task_metrics(article, {"1": said}, ["exact_match"])["exact_match"].value == score
    picked = task_from("picked", [{"prompt": "p", "answer": "no", "choices": ["yes", "no"]}])
    assert chosen_metrics(picked, []) == ["accuracy"]
    assert task_metrics(picked, {"1": "no"}, ["accuracy"])["accuracy"].value == 100
    long = task_from("long", [{"prompt": "p", "answer": "word " * 20}])
    assert chosen_metrics(long, []) == ["rouge1", "rouge2", "rougeL"]
    assert chosen_metrics(long, ["f1"]) == ["f1"]
    with pytest.raises(ConfigError, match="did you mean 'rougeL'"):
        chosen_metrics(long, ["rougel"])
    with pytest.raises(ConfigError, match="with choices"):
        chosen_metrics(picked, ["f1"])


def test_standard_errors_against_many_draws():
    """Of a weighted mean and of a paired difference: the spread of the figure over resampled examples."""
    random_ = np.random.default_rng(0)
    weights = random_.integers(1, 50, 400).astype(float)
    before = random_.normal(2, 1, 400)
    after = before + random_.normal(0.1, 0.2, 400)
    a, b = (
        Metric.of(list(s), weights=list(weights), unit="bits/byte", higher_is_better=False) for s in (before, after)
    )
    draws = random_.integers(0, 400, (4000, 400))
    means = [(s[draws] * weights[draws]).sum(1) / weights[draws].sum(1) for s in (before, after)]
    assert a.value == pytest.approx((before * weights).sum() / weights.sum())
    assert a.standard_error == pytest.approx(means[0].std(), rel=0.1)
    assert paired_error(a, b) == pytest.approx((means[1] - means[0]).std(), rel=0.1)
    assert paired_error(a, b) < 0.4 * math.hypot(a.standard_error, b.standard_error)
    other = Metric.of(list(after), unit="bits/byte", higher_is_better=False)  # other weights: not paired
    assert paired_error(a, other) == math.hypot(a.standard_error, other.standard_error)
    assert Metric.of([1.0], unit="%", higher_is_better=True).standard_error is None


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2: expected an object"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('{"prompt": "\\ud800", "answer": "a"}', "line 2: .* half a character"),
        ('{"prompt": "p"}', "references, reference or answer"),
        ('{"reference": "r"}', "needs prompt or messages"),
        ('{"prompt": "p", "messages": [], "answer": "a"}', "needs prompt or messages"),
        ('{"prompt": "p", "references": []}', "references must be texts that are not empty"),
        ('{"prompt": "p", "references": ["a", " "]}', "references must be texts that are not empty"),
        ('{"prompt": "p", "reference": null}', "reference must be texts"),
        ('{"prompt": " ", "answer": "a"}', "its prompt is empty"),
        ('{"prompt": 3, "answer": "a"}', "its prompt is not a text"),
        ('{"prompt": "p", "answer": "a", "id": "one"}', "line 2: the id 'one' stands there twice"),
        ('{"prompt": "p", "answer": "a", "choices": ["b", "c"]}', "not one of the choices"),
        ('{"prompt": "p", "answer": "b", "choices": ["b", "c"]}', "choices in some lines only"),
        ('{"messages": [{"role": "user"}], "answer": "a"}', "turns with a role and a content"),
        ('{"messages": [{"role": "assistant", "content": "x"}], "answer": "a"}', "last turn is the assistant's"),
    ],
)
def test_what_is_no_task(tmp_path, line, match):
    path = tmp_path / "task.jsonl"
    path.write_text('{"prompt": "p", "answer": "a", "id": "one"}\n' + line + "\n")
    with pytest.raises(EvaluationError, match=match):
        read_task(path)


def test_tasks_that_cannot_be_read(tmp_path):
    path = tmp_path / "task.jsonl"
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_task(path)
    path.write_text("\n\n")
    with pytest.raises(EvaluationError, match="no examples"):
        read_task(path)
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(EvaluationError, match="not UTF-8"):
        read_task(path)


def test_a_task_is_what_it_asks(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [
        {"prompt": "p", "answer": "a"},
        {"messages": [{"role": "user", "content": "q"}], "references": ["b", "c"], "id": None},
    ]
    path.write_text("\ufeff" + "\r\n".join(map(json.dumps, rows)))
    task = read_task(path)
    assert (task.name, [one.id for one in task.examples]) == ("questions", ["1", "2"])
    assert task.examples[1].prompt == ({"role": "user", "content": "q"},)
    assert task.digest == task_from("other name", rows).digest
    rows[0]["answer"] = "A"
    assert task.digest != task_from("questions", rows).digest
    assert [one.id for one in task.first(1).examples] == ["1"]
    path.write_text(json.dumps({"prompt": "a\u2028b\u0085c", "answer": "d"}, ensure_ascii=False) + "\n")
    assert read_task(path).examples[0].prompt == "a\u2028b\u0085c"

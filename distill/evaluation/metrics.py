"""How answers are scored: exact match and token F1 as SQuAD does, ROUGE through rouge-score, accuracy of choices.

Sources: the SQuAD 1.1 evaluation script (lower case, no punctuation, no articles, single spaces; the best of all
references counts), google-research rouge_score with its Porter stemmer (F-measures; the best reference as well).
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from distill.evaluation.report import PERCENT, Metric
from distill.evaluation.tasks import Task
from storage_specs.command_line import nearest
from storage_specs.errors import ConfigError

__all__ = ["METRICS", "chosen_metrics", "exact_match", "normalized", "task_metrics", "token_f1"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
LONG_ANSWER_WORDS = 12  # references of more words on average are summaries rather than answers


def normalized(text: str) -> str:
    """As SQuAD compares answers: lower case, without ASCII punctuation and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> float:
    """1 where both are the same once normalized."""
    return float(normalized(prediction) == normalized(reference))


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the multisets of normalized words. As in SQuAD 1.1, no common word (also of empty answers) gives 0."""
    found, right = Counter(normalized(prediction).split()), Counter(normalized(reference).split())
    common = (found & right).total()
    return 2 * common / (found.total() + right.total()) if common else 0.0


def _rouge(kind: str) -> Callable[[str, str], float]:
    return lambda prediction, reference: _rouge_scorer(kind).score(reference, prediction)[kind].fmeasure


@cache
def _rouge_scorer(kind: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ConfigError(f"--metric {kind} needs rouge-score: pip install 'teach-once[eval]'") from None
    return RougeScorer([kind], use_stemmer=True)


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "f1": token_f1,
    "rouge1": _rouge("rouge1"),
    "rouge2": _rouge("rouge2"),
    "rougeL": _rouge("rougeL"),
}
ACCURACY = "accuracy"


def chosen_metrics(task: Task, named: Sequence[str]) -> list[str]:
    """The metrics asked for, or by default: accuracy of choices, ROUGE of long references, else exact match and F1.

    Raises ConfigError: an unknown one, one that does not go with the task, one whose package is missing.
    """
    fitting = [ACCURACY] if task.has_choices else list(METRICS)
    for name in named:
        if name not in fitting:
            why = "with choices" if task.has_choices else "without choices"
            raise ConfigError(
                f"--metric {name}: the task {task.name} is one {why} ({', '.join(fitting)}){nearest(name, fitting)}"
            )
    if named or task.has_choices:
        names = list(named) or fitting
    else:
        words = [len(reference.split()) for example in task.examples for reference in example.references]
        long = sum(words) / len(words) > LONG_ANSWER_WORDS
        names = ["rouge1", "rouge2", "rougeL"] if long else ["exact_match", "f1"]
    for name in names:
        if name.startswith("rouge"):
            _rouge_scorer(name)
    return names


def task_metrics(task: Task, answers: Mapping[str, str], names: Sequence[str]) -> dict[str, Metric]:
    """{metric: percent over the examples, in their order}; answers: {example's id: what the model said}."""
    metrics = {}
    for name in names:
        compare = (lambda answer, right: float(answer == right)) if name == ACCURACY else METRICS[name]
        # An empty answer is none, even where a reference is nothing but an article.
        scores = [
            100 * max(compare(answers[one.id], right) for right in one.references) if answers[one.id].strip() else 0.0
            for one in task.examples
        ]
        metrics[name] = Metric.of(scores, unit=PERCENT, higher_is_better=True)
    return metrics

"""The tasks of scripts/proof.py: documents to train, validate and test on, and how answers to the test are scored.

No passage is in two of the three. A document is a prompt and an answer; the first reference is the answer that is
learned, all of them count as right.
"""

from functools import cache as cached

import task_assets
from proof_grid import Training
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.evaluation.answering import Answering, answers, completed
from distill.evaluation.metrics import chosen_metrics, task_metrics
from distill.evaluation.tasks import Task, task_from
from storage_specs.document import Document

TEST, VALIDATION = 0.3, 0.1  # shares of the passages
LOADERS = task_assets.TASKS | {"dialogues": lambda: [*task_assets.mts_dialog(), *task_assets.aci_bench()]}
HEADLINE = ("f1", "rougeL", "accuracy")  # the metric that stands in the tables, whichever a task has
BATCH = 32  # prompts that are answered together


@cached
def parts(task: str) -> dict[str, Task]:
    """{"train", "validation", "test"} of a task, in an order that hides where the examples come from."""
    examples = sorted(LOADERS[task](), key=lambda example: example["id"])
    train, held_back = task_assets.split(examples, TEST + VALIDATION)
    validation, test = task_assets.split(held_back, TEST)
    return {
        name: task_from(task, part) for name, part in {"train": train, "validation": validation, "test": test}.items()
    }


def documents(task: str, part: str, count: int) -> list[Document]:
    """The first `count` examples of a part, with the answers that are right."""
    return [completed(example, example.references[0]) for example in parts(task)[part].first(count).examples]


def answer_scores(
    task: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, training: Training
) -> dict[str, float]:
    """{metric: percent} of the answers that a model gives on a task's test, one of `HEADLINE` first; {}: plain text.

    An answer is what it writes greedily up to the first line's end, or the likeliest of the task's choices.
    """
    if task == "wikipedia":
        return {}
    test = parts(task)["test"].first(training.test)
    how = Answering(max_new_tokens=training.max_new_tokens, batch_size=BATCH, max_length=2 * training.max_length)
    given = {
        answer.id: answer.text.split("\n")[0]
        for batch in answers(model.eval(), tokenizer, test.examples, how, label=task)
        for answer in batch
    }
    names = sorted(chosen_metrics(test, ()), key=lambda name: name not in HEADLINE)
    return {name: metric.value for name, metric in task_metrics(test, given, names).items()}

"""The tasks of scripts/proof.py as documents to train, validate and test on. No passage is in two of the three.

A document is a prompt and an answer; the first reference is the answer that is learned, all of them score a prediction.
"""

from functools import cache as cached

import task_assets
from task_assets import Example

from storage_specs import completion_document
from storage_specs.document import Document

TEST, VALIDATION = 0.3, 0.1  # shares of the passages
LOADERS = task_assets.TASKS | {"dialogues": lambda: [*task_assets.mts_dialog(), *task_assets.aci_bench()]}


@cached
def examples(task: str) -> dict[str, list[Example]]:
    """{"train", "validation", "test"} of a task, in an order that hides where they come from."""
    found = sorted(LOADERS[task](), key=lambda example: example["id"])
    train, held_back = task_assets.split(found, TEST + VALIDATION)
    validation, test = task_assets.split(held_back, TEST)
    return {"train": train, "validation": validation, "test": test}


def documents(task: str, part: str, count: int) -> list[Document]:
    """The first `count` examples of a part as documents; answers begin with the space that the prompt lacks."""
    return [
        completion_document(example["prompt"], f" {example['references'][0]}")
        for example in examples(task)[part][:count]
    ]

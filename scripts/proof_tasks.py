"""The tasks of scripts/proof.py as documents, and how their answers are scored."""

from typing import Any

from proof_grid import Training

from storage_specs.document import Document


def training_documents(task: str, count: int) -> list[Document]:
    raise NotImplementedError


def validation_documents(task: str, count: int) -> list[Document]:
    raise NotImplementedError


def test_documents(task: str, count: int) -> list[Document]:
    raise NotImplementedError


def answer_scores(task: str, model: Any, tokenizer: Any, training: Training) -> dict[str, float]:
    """{metric: score} of the answers a model generates on a task's test split; the first is the one that counts."""
    return {}

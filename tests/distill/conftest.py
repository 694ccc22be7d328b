"""Tokenizers of the real pair, a tiny cache with the teacher's coordinates, a tiny student with the student's."""

from pathlib import Path

import pytest
from cache_making import tiny_student, write_cache
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from storage_specs import chat_document, completion_document, is_held_out, text_document


@pytest.fixture(scope="session")
def gemma_tokenizer(gemma_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(gemma_path)


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_path)


@pytest.fixture(scope="session")
def documents(wiki_texts: list[str]) -> list:
    """25 documents of unequal lengths and all kinds but chat; one without scored bytes."""
    texts = [text_document(text[: 60 + 37 * number]) for number, text in enumerate(wiki_texts[:20])]
    prompted = [completion_document(text[:50], text[50:120]) for text in wiki_texts[20:24]]
    return [*texts, *prompted, completion_document("a prompt and nothing after it", "")]


@pytest.fixture(scope="session")
def cache_path(documents, gemma_tokenizer, tmp_path_factory) -> Path:
    """Random rows at Gemma's boundaries, top 8 of 300 words, ids of the first 4."""
    return write_cache(tmp_path_factory.mktemp("caches") / "gemma", documents, gemma_tokenizer)


@pytest.fixture(scope="session")
def cache_without_held_out(documents, gemma_tokenizer, tmp_path_factory) -> Path:
    """As `cache_path`, of documents that may all be trained on."""
    trained_on = [document for document in documents if not is_held_out(document.doc_id)]
    return write_cache(tmp_path_factory.mktemp("caches") / "no_held_out", trained_on, gemma_tokenizer)


@pytest.fixture(scope="session")
def chat_cache_path(wiki_texts, smollm2_tokenizer, tmp_path_factory) -> Path:
    """Chats of two turns at SmolLM2's boundaries."""
    chats = [
        chat_document(
            [
                {"role": "user", "content": text[:40]},
                {"role": "assistant", "content": text[40:90].strip()},
                {"role": "user", "content": text[90:120]},
                {"role": "assistant", "content": text[120:220].strip()},
            ]
        )
        for text in wiki_texts[:6]
    ]
    return write_cache(tmp_path_factory.mktemp("caches") / "chat", chats, smollm2_tokenizer)


@pytest.fixture(scope="session")
def student_path(smollm2_tokenizer, tmp_path_factory) -> Path:
    return tiny_student(tmp_path_factory.mktemp("students") / "tiny", smollm2_tokenizer)

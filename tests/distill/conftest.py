"""Tokenizers of the real pair, a tiny cache with the teacher's coordinates, a tiny student with the student's."""

from pathlib import Path

import pytest
import torch
from cache_making import COUNTED, counting_text, tiny_student, write_cache, write_counting_cache
from tokenizer_assets import tokenizer_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from training import trainer
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from storage_specs import chat_document, completion_document, is_held_out, text_document


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """What a test draws at random does not depend on the tests before it, nor on the hour."""
    set_seed(0)


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


@pytest.fixture(scope="session")
def t5_tokenizer():
    return PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file("t5")), eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def mt0_path(t5_tokenizer, tmp_path_factory):
    """A random two-layer T5 as a Hugging Face folder."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("students") / "t5"
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    settings = T5Config(vocab_size=len(t5_tokenizer), decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **sizes)
    T5ForConditionalGeneration(settings).save_pretrained(path)
    t5_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def prompts_path(wiki_texts, gemma_tokenizer, tmp_path_factory):
    """Prompts with completions, and two texts."""
    documents = [completion_document(text[:60], text[60 : 130 + 9 * n]) for n, text in enumerate(wiki_texts[:30])]
    documents += [text_document(text[:90]) for text in wiki_texts[30:32]]
    return write_cache(tmp_path_factory.mktemp("caches") / "prompts", documents, gemma_tokenizer)


def counting_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which each word of `counting_text` is a token; so small that a step takes milliseconds."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe = BpeTrainer(vocab_size=400, special_tokens=["<end>"], initial_alphabet=ByteLevel.alphabet())
    tokenizer.train_from_iterator([f" {word}" for word in COUNTED], bpe)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>", pad_token="<end>")


@pytest.fixture(scope="session")
def counting(tmp_path_factory) -> dict[str, Path]:
    """Documents that count, in caches of teachers that know the odds, shuffled ones, the very text; and a student that
    has learned by CE to."""
    folder, tokenizer = tmp_path_factory.mktemp("counting"), counting_tokenizer()
    documents = [text_document(counting_text(seed)) for seed in range(160)]
    student = tiny_student(folder / "student", tokenizer)
    caches = {
        knows: write_counting_cache(folder / knows, documents, tokenizer, knows)
        for knows in ("odds", "shuffled", "text")
    }
    options = {"loss": "ce:1", "max_steps": 34, "max_length": 96, "per_device_train_batch_size": 8}
    one = trainer(caches["odds"], student, folder / "out", learning_rate=2e-2, **options)
    one.train()
    assert one.state.log_history[-2]["ce"] < 1.5
    one.model.save_pretrained(student)
    return caches | {"student": student}

"""Token bytes, special roles, spans of generated ids and tokenizer digests, on real tokenizers."""

from pathlib import Path

import numpy as np
import pytest
import tokenizer_assets
from chat_templates import GEMMA, LLAMA3, ZEPHYR
from nasty_strings import NASTY
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from storage_specs.encoding import encode
from storage_specs.errors import TokenizerError
from storage_specs.vocabulary import spans_of_ids, special_roles, token_bytes, token_with_role, tokenizer_digest


@pytest.fixture(scope="module")
def gemma(gemma_path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(gemma_path / "tokenizer.json"))


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(smollm2_path)


def test_token_bytes_of_every_kind(gemma: Tokenizer, smollm2: PreTrainedTokenizerFast) -> None:
    cases = [
        (gemma, "▁the", b" the"),
        (gemma, "▁▁▁", b"   "),
        (gemma, "<0xE2>", b"\xe2"),
        (gemma, "<end_of_turn>", b"<end_of_turn>"),
        (gemma, "日本", "日本".encode()),
        (smollm2.backend_tokenizer, "Ġthe", b" the"),
        (smollm2.backend_tokenizer, "Ċ", b"\n"),
        (smollm2.backend_tokenizer, "<|im_end|>", b"<|im_end|>"),
        (tokenizer_assets.load("llama2"), "<0x0A>", b"\n"),
        (tokenizer_assets.load("bert"), "##ing", b"ing"),
        (tokenizer_assets.load("bert"), "the", b"the"),
        (tokenizer_assets.load("clip"), "the</w>", b"the"),
        (tokenizer_assets.load("t5"), "▁the", b" the"),
        (tokenizer_assets.load("t5"), "<extra_id_0>", b"<extra_id_0>"),
        (tokenizer_assets.load("pythia"), " " * 24, b" " * 24),
    ]
    for tokenizer, token, expected in cases:
        assert token_bytes(tokenizer)[tokenizer.token_to_id(token)] == expected


def test_token_bytes_has_one_entry_per_id(gemma: Tokenizer) -> None:
    spelled = token_bytes(gemma)
    assert len(spelled) == 262_144
    assert None not in spelled


def test_holes_have_no_bytes() -> None:
    tokenizer = Tokenizer.from_str(
        '{"version":"1.0","added_tokens":[],"model":{"type":"WordLevel","vocab":{"a":0,"b":3},"unk_token":"a"}}'
    )
    assert token_bytes(tokenizer) == [b"a", None, None, b"b"]
    with pytest.raises(TokenizerError, match="token id 1 stands for no bytes"):
        spans_of_ids(token_bytes(tokenizer), [0, 1])


def test_token_bytes_spell_the_text(gemma: Tokenizer, smollm2: PreTrainedTokenizerFast, wiki_texts: list[str]) -> None:
    for tokenizer in (gemma, smollm2):
        spelled = token_bytes(tokenizer)
        for text in wiki_texts[:8]:
            ids = encode(tokenizer, [text], add_special_tokens=False)[0].ids
            assert b"".join(spelled[n] for n in ids).decode() == text


def test_spans_of_ids(gemma: Tokenizer) -> None:
    spelled = token_bytes(gemma)
    for text in [text for text in NASTY if "\u2581" not in text]:
        encoding = encode(gemma, [text], add_special_tokens=False)[0]
        spans_T2 = spans_of_ids(spelled, encoding.ids)
        assert spans_T2.dtype == np.int64
        assert spans_T2.tolist() == encoding.spans.tolist()
    assert spans_of_ids(spelled, []).shape == (0, 2)


def test_spans_of_ids_refuses_what_is_no_text(gemma: Tokenizer) -> None:
    spelled = token_bytes(gemma)
    with pytest.raises(TokenizerError, match="not UTF-8"):
        spans_of_ids(spelled, [gemma.token_to_id("<0xE2>")])
    with pytest.raises(TokenizerError, match="wrong tokenizer"):
        spans_of_ids(spelled, [262_144])


def named(roles: dict[int, str]) -> dict[str, int]:
    return {role: token_id for token_id, role in roles.items() if role != "other"}


def wrapped(name: str, template: str | None, **tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer_assets.load(name), chat_template=template, **tokens)


def test_special_roles(gemma_path: Path, gemma: Tokenizer, smollm2: PreTrainedTokenizerFast) -> None:
    base = PreTrainedTokenizerFast(tokenizer_object=gemma, bos_token="<bos>", eos_token="<eos>")
    assert named(special_roles(base)) == {"bos": 2, "eos": 1, "end_of_turn": 106}
    base.chat_template = GEMMA
    assert named(special_roles(base)) == {"bos": 2, "eos": 1, "end_of_turn": 106}
    # <|im_end|> is SmolLM2's EOS and closes its turns: closing turns counts.
    assert named(special_roles(smollm2)) == {"bos": 1, "end_of_turn": 2}
    roles = special_roles(smollm2)
    assert set(roles) == {n for n, added in smollm2.added_tokens_decoder.items() if added.special}
    llama3 = wrapped("llama3", LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")
    assert named(special_roles(llama3)) == {"bos": 128_000, "eos": 128_001, "end_of_turn": 128_009}
    llama2 = wrapped("llama2", ZEPHYR, bos_token="<s>", eos_token="</s>")
    assert named(special_roles(llama2)) == {"bos": 1, "end_of_turn": 2}
    gpt2 = wrapped("gpt2", None, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    assert named(special_roles(gpt2)) == {"eos": 50_256}
    assert named(special_roles(tokenizer_assets.load("llama3"))) == {"end_of_turn": 128_009}


def test_eos_and_end_of_turn_stand_in_for_each_other() -> None:
    assert token_with_role({1: "bos", 2: "end_of_turn"}, "eos") == 2
    assert token_with_role({7: "eos"}, "end_of_turn") == 7
    assert token_with_role({1: "eos", 7: "end_of_turn"}, "eos") == 1
    assert token_with_role({1: "eos", 7: "end_of_turn"}, "end_of_turn") == 7
    assert token_with_role({1: "eos"}, "bos") is None
    assert token_with_role({1: "other"}, "other") is None


def test_digest_is_the_tokenizers_identity(smollm2_path: Path, smollm2: PreTrainedTokenizerFast) -> None:
    digest = tokenizer_digest(smollm2)
    again = AutoTokenizer.from_pretrained(smollm2_path)
    assert tokenizer_digest(again) == digest
    again(["a long text", "b"], truncation=True, max_length=2, padding="max_length")
    assert again.backend_tokenizer.truncation is not None
    assert tokenizer_digest(again) == digest
    assert tokenizer_digest(Tokenizer.from_file(str(smollm2_path / "tokenizer.json"))) == digest
    again.add_tokens(["<new>"])
    assert tokenizer_digest(again) != digest
    assert tokenizer_digest(tokenizer_assets.load("gpt2")) != digest

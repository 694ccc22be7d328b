"""SentencePiece and tiktoken files against what the libraries that wrote them say, and their byte spans.

IDS are what sentencepiece 0.2 gives for Mistral's file:
    SentencePieceProcessor(model_file=...).encode(text)
"""

import base64
from pathlib import Path

import pytest
import tokenizer_assets
from nasty_strings import NASTY
from test_encoding import check
from tokenizers import Tokenizer

from storage_specs.encoding import byte_spans, encode
from storage_specs.errors import TokenizerError
from storage_specs.foreign_tokenizers import from_sentencepiece, from_tiktoken
from storage_specs.token_table import token_table

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
IDS = {
    "The quick brown fox; naïve café 1984.": [
        415,
        2936,
        9060,
        285,
        1142,
        28745,
        1879,
        28920,
        333,
        28345,
        28705,
        28740,
        28774,
        28783,
        28781,
        28723,
    ],
    " two  spaces": [28705, 989, 28705, 10599],
    "日本語の文章": [28705, 29142, 29119, 30321, 28993, 29019, 30138],
    "a\tb\n\nc": [264, 12, 28726, 13, 13, 28717],
    "𐎀 😀": [28705, 243, 147, 145, 131, 28705, 30575],
    "Zoë's “x”": [1054, 28709, 28919, 28742, 28713, 981, 28744, 28838],
    "def f(x):\n    return x": [801, 285, 28732, 28744, 1329, 13, 2287, 604, 1318],
}


@pytest.fixture(scope="module")
def mistral() -> Tokenizer:
    return from_sentencepiece(tokenizer_assets.sentencepiece_file("mistral"))


@pytest.fixture(scope="module")
def tiktoken_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's own vocabulary, written as tiktoken writes it."""
    words = token_table(tokenizer_assets.load("gpt2")).bytes[:50256]
    file = tmp_path_factory.mktemp("tiktoken") / "gpt2.tiktoken"
    file.write_bytes(b"".join(base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(words)))
    return file


def test_sentencepiece_ids_are_sentencepieces(mistral: Tokenizer) -> None:
    for text, ids in IDS.items():
        assert encode(mistral, [text])[0].ids.tolist() == [1, *ids], text


def test_sentencepiece_spans(mistral: Tokenizer) -> None:
    for text in NASTY:
        check("llama2", mistral, text)
    data = "a ①".encode()
    assert b"".join(data[start:end] for start, end in byte_spans(mistral, ["a ①"])[0].tolist()) == data


def test_unigram_is_the_tokenizer_that_hugging_face_made_of_the_same_file() -> None:
    ours = from_sentencepiece(tokenizer_assets.sentencepiece_file("t5"))
    texts = [*NASTY, "The quick brown fox; na\u00efve caf\u00e9 1984."]
    for own, theirs in zip(
        encode(ours, texts), encode(tokenizer_assets.load("t5"), texts, add_special_tokens=False), strict=True
    ):
        assert own.ids.tolist() == theirs.ids.tolist()
    ours = from_sentencepiece(tokenizer_assets.sentencepiece_file("t5"), add_bos=False)
    for text in NASTY:  # Hugging Face's keeps spaces in front, ours drops them as SentencePiece does: spans may differ
        check("t5", ours, text)


def test_tiktoken_is_the_tokenizer_it_was_made_from(tiktoken_file: Path, wiki_texts: list[str]) -> None:
    ours = from_tiktoken(tiktoken_file, GPT2_PATTERN, {"<|endoftext|>": 50256})
    texts = [*NASTY, *wiki_texts[:8]]
    for own, theirs in zip(encode(ours, texts), encode(tokenizer_assets.load("gpt2"), texts), strict=True):
        assert own.ids.tolist() == theirs.ids.tolist()
        assert own.spans.tolist() == theirs.spans.tolist()


def test_a_table_of_ranks_is_as_good_as_its_file() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"abc": 257, b"\xc3\xa9": 258}
    tokenizer = from_tiktoken(ranks, r"\w+|\W+", {"<end>": 300})
    assert encode(tokenizer, ["abcab é<end>"])[0].ids.tolist() == [257, 256, 32, 258, 300]
    assert byte_spans(tokenizer, ["abc é"])[0].tolist() == [[0, 3], [3, 4], [4, 6]]


@pytest.mark.parametrize("content", [b"not base64! 1\n", b"YQ==\n", b"\x0a\xff\xff"], ids=range(3))
def test_files_that_are_something_else_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(TokenizerError, match="no tiktoken file"):
        from_tiktoken(tmp_path / "file", r"\w+")
    with pytest.raises(TokenizerError, match="SentencePiece"):
        from_sentencepiece(tmp_path / "file")
    with pytest.raises(TokenizerError, match="absent"):
        from_sentencepiece(tmp_path / "absent")


def test_other_kinds_of_sentencepiece_are_refused(tmp_path: Path) -> None:
    # one piece "<unk>" of kind unknown, and a trainer of kind word (3)
    (tmp_path / "word.model").write_bytes(b"\x0a\x09\x0a\x05<unk>\x18\x02" + b"\x12\x02\x18\x03")
    with pytest.raises(TokenizerError, match="not kind 3"):
        from_sentencepiece(tmp_path / "word.model")

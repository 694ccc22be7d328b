"""Byte spans against what must hold for every tokenizer and every text, and against cases worked out by hand."""

import types
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizer_assets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nasty_strings import NASTY
from tokenizers import Tokenizer, models, pre_tokenizers

from storage_specs.encoding import _check, byte_spans, encode
from storage_specs.errors import TokenizerError
from storage_specs.token_table import token_table

# Every byte of every text reaches these models (SmolLM2: every byte that its vocabulary has).
LOSSLESS = ("gemma", "gpt2", "pythia", "qwen3", "llama2", "llama3", "smollm2")
LOSSY = ("t5", "bert", "clip")
Load = Callable[[str], Tokenizer]
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
MARKS = st.text(st.sampled_from("aeo \n\u0301\u0302\u0323\u031c\u0344\u1100\u1161\u11a8가\u200d\x04ﬁA"), max_size=20)
MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="session")
def load(gemma_path: Path, smollm2_path: Path) -> Load:
    """A tokenizer by its name."""
    pair = {
        "gemma": Tokenizer.from_file(str(gemma_path / "tokenizer.json")),
        "smollm2": Tokenizer.from_file(str(smollm2_path / "tokenizer.json")),
    }
    return lambda name: pair.get(name) or tokenizer_assets.load(name)


def covered_bytes(spans_T2: np.ndarray, size: int) -> np.ndarray:
    """How many spans hold each byte; asserts that spans are ordered and inside the text."""
    times = np.zeros(size, dtype=int)
    previous = 0
    for start, end in spans_T2.tolist():
        assert previous <= start <= end <= size
        times[start:end] += 1
        previous = end
    return times


def squeezed(text: str) -> str:
    """Without white space and composition: both depend on what stands next to a dropped character, not on it."""
    return unicodedata.normalize("NFD", "".join(text.replace("\u2581", " ").split()))


def check(name: str, tokenizer: Tokenizer, text: str) -> None:
    """Everything that must hold of the spans of any text."""
    data = text.encode()
    encoding = encode(tokenizer, [text], add_special_tokens=False)[0]
    assert encoding.ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert encoding.ids.dtype == encoding.spans.dtype == np.int64
    assert encoding.spans.shape == (len(encoding.ids), 2)
    times = covered_bytes(encoding.spans, len(data))
    assert times.max(initial=0) <= 1
    if name == "smollm2":
        missing = token_table(tokenizer).missing_bytes[np.frombuffer(data, dtype=np.uint8)]
        assert not (missing & (times > 0) & ~inside(encoding.spans, len(data))).any()
        assert (missing | (times > 0)).all()
    elif name in LOSSLESS:
        assert (times == 1).all()
    else:
        whole = whole_characters(text, times)
        if name == "t5":  # what its normalizer drops hangs on whole graphemes: marks, white space, unseen characters
            kinds = {unicodedata.category(char)[0] for char, kept in zip(text, whole, strict=True) if not kept}
            assert not kinds & set("LNP")
        else:
            kept = "".join(char if kept else " " for char, kept in zip(text, whole, strict=True))
            normalize = tokenizer.normalizer.normalize_str
            assert squeezed(normalize(kept)) == squeezed(normalize(text)), "a byte that counts is in no span"
    framed, own = encode(tokenizer, [text])[0], len(encoding.ids)
    assert any(  # the same tokens, and around them what the tokenizer adds, without width
        framed.ids[n : n + own].tolist() == encoding.ids.tolist()
        and framed.spans[n : n + own].tolist() == encoding.spans.tolist()
        and not np.diff(np.delete(framed.spans, range(n, n + own), axis=0), axis=1).any()
        for n in range(len(framed.ids) - own + 1)
    )


def inside(spans_T2: np.ndarray, size: int) -> np.ndarray:
    """(size,) bool: bytes strictly inside a span: a dropped byte between two that one token joined."""
    within = np.zeros(size, dtype=bool)
    for start, end in spans_T2.tolist():
        within[start + 1 : end - 1] = True
    return within


def whole_characters(text: str, times: np.ndarray) -> list[bool]:
    """Per character whether its bytes are in spans; asserts that none is so in part."""
    whole, position = [], 0
    for char in text:
        bytes_of_char = times[position : position + len(char.encode())]
        assert bytes_of_char.all() or not bytes_of_char.any(), f"half of {char!r} is in no span"
        whole.append(bool(bytes_of_char.all()))
        position += len(char.encode())
    return whole


@pytest.mark.parametrize("name", LOSSLESS + LOSSY)
def test_nasty_strings(load: Load, name: str) -> None:
    for text in NASTY:
        check(name, load(name), text)
    joined = " ".join(NASTY)
    check(name, load(name), joined)


@pytest.mark.parametrize("name", ["gemma", "smollm2"])
@MANY
@given(text=UNICODE | MARKS)
def test_any_unicode_with_the_real_pair(load: Load, name: str, text: str) -> None:
    check(name, load(name), text)


@pytest.mark.parametrize("name", [name for name in LOSSLESS + LOSSY if name not in ("gemma", "smollm2")])
@settings(MANY, max_examples=60)
@given(text=UNICODE | MARKS)
def test_any_unicode_with_every_kind(load: Load, name: str, text: str) -> None:
    check(name, load(name), text)


def pieces(tokenizer: Tokenizer, text: str) -> list[bytes]:
    return [text.encode()[start:end] for start, end in byte_spans(tokenizer, [text], False)[0].tolist()]


@pytest.mark.parametrize("name", ["gpt2", "llama3", "smollm2", "gemma"])
def test_spans_are_the_tokens_own_bytes_where_nothing_is_altered(load: Load, wiki_texts: list[str], name: str) -> None:
    table = token_table(load(name))
    for text, encoding in zip(wiki_texts[:16], encode(load(name), wiki_texts[:16], False), strict=True):
        data = text.encode()
        assert [data[start:end] for start, end in encoding.spans.tolist()] == [table.bytes[n] for n in encoding.ids]


# tokenizer, text, the bytes of each token's span
BY_HAND = [
    ("gpt2", "😀", [b"\xf0\x9f\x98", b"\x80"]),
    ("gemma", "\U00010380", [b"\xf0", b"\x90", b"\x8e", b"\x80"]),
    ("llama2", "①", [b"", b"\xe2", b"\x91", b"\xa0"]),  # the invented prefix space has no bytes
    ("llama2", " a", [b"", b" a"]),
    ("pythia", "a  b", [b"a", b"  ", b"b"]),  # offsets that were trimmed of their spaces
    ("qwen3", " e\u0301x", [b" e\xcc\x81", b"x"]),  # NFC made one character of two
    ("qwen3", "\u0344", [b"\xcd\x84", b"", b""]),  # NFC made two of one: the first token has it whole
    ("smollm2", "a\x04b", [b"a", b"b"]),  # SmolLM2 has no token for 0x04
    ("bert", "Café au  lait", ["Café".encode(), b"au", b"lai", b"t"]),
    ("t5", "日本 ok", [b"", "日本".encode(), b" ", b"ok"]),  # one unknown token for two characters
    ("t5", "\x04Hello  you", [b"Hello", b" you"]),
    ("clip", "Hello  E\u0301!", [b"Hello", b"E\xcc\x81", b"!"]),
]


@pytest.mark.parametrize(("name", "text", "expected"), BY_HAND)
def test_cases_by_hand(load: Load, name: str, text: str, expected: list[bytes]) -> None:
    assert pieces(load(name), text) == expected


def test_added_special_tokens_have_no_width_and_written_ones_do(load: Load) -> None:
    encoding = encode(load("gemma"), ["<bos>a"])[0]
    assert encoding.ids.tolist()[:2] == [2, 2]
    assert encoding.spans.tolist() == [[0, 0], [0, 5], [5, 6]]
    spans = byte_spans(load("bert"), ["ab ab"])[0]
    assert spans.tolist() == [[0, 0], [0, 2], [3, 5], [5, 5]]
    assert byte_spans(load("t5"), [""])[0].tolist() == [[0, 0]]
    assert byte_spans(load("gpt2"), [""])[0].shape == (0, 2)


def test_a_transformers_tokenizer_is_its_backend(smollm2_path: Path) -> None:
    from transformers import AutoTokenizer

    bare = Tokenizer.from_file(str(smollm2_path / "tokenizer.json"))
    for ours, theirs in zip(
        encode(AutoTokenizer.from_pretrained(smollm2_path), NASTY), encode(bare, NASTY), strict=True
    ):
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert ours.spans.tolist() == theirs.spans.tolist()


def test_truncation_and_padding_are_not_applied_and_stay(load: Load) -> None:
    tokenizer = Tokenizer.from_str(load("gpt2").to_str())
    plain = encode(tokenizer, ["one two three four", "five"])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9, pad_id=50256, pad_token="<|endoftext|>")
    truncation, padding = tokenizer.truncation, tokenizer.padding
    again = encode(tokenizer, ["one two three four", "five"])
    assert [encoding.ids.tolist() for encoding in again] == [encoding.ids.tolist() for encoding in plain]
    assert (tokenizer.truncation, tokenizer.padding) == (truncation, padding)


def test_new_tokens_are_seen(load: Load) -> None:
    tokenizer = Tokenizer.from_str(load("gpt2").to_str())
    assert len(pieces(tokenizer, "a<new>b")) > 3
    tokenizer.add_special_tokens(["<new>"])
    assert pieces(tokenizer, "a<new>b") == [b"a", b"<new>", b"b"]


def test_prefix_space_of_byte_level_tokenizers(load: Load) -> None:
    tokenizer = Tokenizer.from_str(load("gpt2").to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert pieces(tokenizer, "hello world") == [b"hello", b" world"]


def test_slow_tokenizers_are_refused() -> None:
    with pytest.raises(TokenizerError, match=r"no fast backend.*use_fast=True"):
        encode(types.SimpleNamespace(encode=lambda text: []), ["a"])


def test_lone_surrogates_are_refused(load: Load) -> None:
    with pytest.raises(TokenizerError, match="lone surrogate at character 2"):
        encode(load("gpt2"), ["ok", "ab\ud800"])


@pytest.mark.parametrize("spans", [[[0, 3], [2, 5]], [[0, 2], [3, 6]], [[2, 1]], [[-1, 2]]])
def test_impossible_spans_are_refused(spans: list[list[int]]) -> None:
    with pytest.raises(TokenizerError, match="do not fit the text"):
        _check(np.array(spans), b"abcde")


def test_a_tokenizer_without_any_tokens() -> None:
    assert byte_spans(Tokenizer(models.BPE()), ["abc"], False)[0].shape == (0, 2)

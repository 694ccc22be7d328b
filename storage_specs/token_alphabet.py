"""How a token's string spells bytes: the byte-level alphabet, <0xNN> bytes, U+2581 for a space, ## and word ends.

A vocabulary stores strings, and every family of tokenizers writes bytes in them in its own way. `token_alphabet`
finds out which way a backend has, and gives the bytes of each token as they stand inside running text.
"""

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from storage_specs.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

SPACE_SYMBOL = "\u2581"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: a printable byte is its own Latin-1 character, the others start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_LEVEL = _byte_level_alphabet()


def backend_of(tokenizer: Any) -> "tokenizers.Tokenizer":
    """The `tokenizers.Tokenizer` in a transformers fast tokenizer, or the bare one itself. Raises TokenizerError."""
    backend = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "_tokenizer", None) or tokenizer
    # Not isinstance: a reader of caches needs no tokenizers library, so it is never imported here.
    if not hasattr(backend, "encode_batch_fast"):
        raise TokenizerError(
            f"tokenizer {type(tokenizer).__name__} has no fast backend, so it cannot say which bytes its tokens stand "
            "for: load it with AutoTokenizer.from_pretrained(..., use_fast=True), or convert it to a tokenizer.json "
            "(transformers.convert_slow_tokenizer.convert_slow_tokenizer) and pass that"
        )
    return backend


def component(part: Any) -> dict[str, Any]:
    """A normalizer's, pre-tokenizer's, decoder's or post-processor's own JSON; {} where the backend has none."""
    return json.loads(part.__getstate__()) if part is not None else {}


def steps(part: Any) -> list[dict[str, Any]]:
    """The same as a flat list of its steps, sequences unfolded."""
    return _unfold(component(part))


def _unfold(state: dict[str, Any]) -> list[dict[str, Any]]:
    for inner in ("normalizers", "pretokenizers", "decoders", "processors"):
        if inner in state:
            return [step for part in state[inner] for step in _unfold(part)]
    return [state] if state else []


@dataclass(frozen=True, kw_only=True)
class TokenAlphabet:
    """How one backend spells bytes."""

    byte_level: bool
    space_symbol: bool
    byte_fallback: bool
    subword_prefix: str
    word_suffix: str

    def spell(self, token: str) -> bytes:
        """The bytes of a token of the model's vocabulary, without marks that are not text (##, </w>)."""
        if self.byte_fallback and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self.subword_prefix:
            token = token.removeprefix(self.subword_prefix)
        if self.word_suffix:
            token = token.removesuffix(self.word_suffix)
        if self.byte_level:
            try:
                return bytes([BYTE_LEVEL[character] for character in token])
            except KeyError:  # not written in the alphabet: an added token that also stands in the vocabulary
                return token.encode()
        return (token.replace(SPACE_SYMBOL, " ") if self.space_symbol else token).encode()

    def spell_added(self, token: str, special: bool) -> bytes:
        """The bytes of an added token: its content, as it is matched in the text; runs of spaces may be U+2581."""
        return (token.replace(SPACE_SYMBOL, " ") if self.space_symbol and not special else token).encode()


def token_alphabet(backend: "tokenizers.Tokenizer") -> TokenAlphabet:
    """Find out how `backend` spells bytes, from its components."""
    around = steps(backend.normalizer) + steps(backend.pre_tokenizer) + steps(backend.decoder)
    model = backend.model
    return TokenAlphabet(
        byte_level=any(step["type"] == "ByteLevel" for step in around),
        space_symbol=any(step["type"] == "Metaspace" or SPACE_SYMBOL in _literals(step) for step in around),
        byte_fallback=bool(getattr(model, "byte_fallback", False))
        or any(step["type"] == "ByteFallback" for step in around),
        subword_prefix=getattr(model, "continuing_subword_prefix", None) or "",
        word_suffix=getattr(model, "end_of_word_suffix", None) or "",
    )


def _literals(step: dict[str, Any]) -> str:
    """The characters that a Replace or Prepend step writes or looks for."""
    pattern = step.get("pattern")
    sought = pattern.get("String", "") if isinstance(pattern, dict) else ""
    return sought + str(step.get("content", "")) + str(step.get("prepend", ""))

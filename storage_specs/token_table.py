"""A tokenizer's tokens as bytes, and how it treats text: worked out once per tokenizer, and looked up ever after."""

import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from storage_specs.token_alphabet import TokenAlphabet, backend_of, steps, token_alphabet

if TYPE_CHECKING:
    import tokenizers

TABLES_KEPT = 16


class TokenTable:
    """What one backend's ids spell, and what it does to a text (about 1 us per id to make).

    bytes: the bytes of every id, None for holes. special_ids: the ids of special tokens.
    """

    def __init__(self, backend: "tokenizers.Tokenizer") -> None:
        self.backend = backend
        self.alphabet: TokenAlphabet = token_alphabet(backend)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.bytes: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for token, token_id in vocabulary.items():
            self.bytes[token_id] = self.alphabet.spell(token)
        self.special_ids: set[int] = set()
        for token_id, added in backend.get_added_tokens_decoder().items():
            self.bytes[token_id] = self.alphabet.spell_added(added.content, added.special)
            if added.special:
                self.special_ids.add(token_id)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(V,) int64: bytes of each id; 0 for holes."""
        return np.array([len(spelled or b"") for spelled in self.bytes], dtype=np.int64)

    @cached_property
    def missing_bytes(self) -> np.ndarray:
        """(256,) bool: bytes that a byte-level vocabulary without an unknown token silently drops.

        SmolLM2 has no token for 0x04, 0xF1 and nineteen others: they never reach the model.
        """
        missing = np.zeros(256, dtype=bool)
        if self.alphabet.byte_level and getattr(self.backend.model, "unk_token", None) is None:
            single = {spelled for spelled in self.bytes if spelled is not None and len(spelled) == 1}
            missing[[byte for byte in range(256) if bytes([byte]) not in single]] = True
        return missing

    @cached_property
    def keeps_text(self) -> bool:
        """Whether most texts survive tokenisation byte by byte (no lower-casing, no dropped spaces, no marks)."""
        harmless = ("NFC", "Replace", "Prepend")
        return not (self.alphabet.subword_prefix or self.alphabet.word_suffix) and all(
            step["type"] in harmless for step in steps(self.backend.normalizer)
        )

    @cached_property
    def _added_tokens(self) -> re.Pattern[str]:
        contents = [added.content for added in self.backend.get_added_tokens_decoder().values()]
        return re.compile("|".join(map(re.escape, contents)) if contents else "(?!)")

    def dropped_in_front(self, text: str) -> list[int]:
        """The characters that the normalizer drops at the start of a text, or right behind an added token in it."""
        if self.backend.normalizer is None:
            return []
        normalize = self.backend.normalizer.normalize_str
        unseen = [character for character in set(text) if not character.isprintable()]
        unseen = {character for character in unseen if normalize(f"a{character}a") == normalize("aa")}
        dropped = []
        for position in [0] + [match.end() for match in self._added_tokens.finditer(text)] if unseen else []:
            while position < len(text) and text[position] in unseen:
                dropped.append(position)
                position += 1
        return dropped

    @cached_property
    def trims_offsets(self) -> bool:
        """Whether the post-processor cuts spaces off the offsets (they remain the token's bytes)."""
        return any(
            step["type"] in ("ByteLevel", "RobertaProcessing") and step.get("trim_offsets", True)
            for step in steps(self.backend.post_processor)
        )


_tables: dict[tuple[int, int], TokenTable] = {}


def token_table(tokenizer: Any) -> TokenTable:
    """The table of a tokenizer's vocabulary. The last few are kept.

    New tokens are noticed; a normalizer or processor that is exchanged after the first use is not.
    """
    backend = backend_of(tokenizer)
    # The table holds the backend, so its id() is not used again while the table is kept.
    key = (id(backend), backend.get_vocab_size(with_added_tokens=True))
    table = _tables.pop(key, None)
    if table is None:
        table = TokenTable(backend)
    _tables[key] = table
    while len(_tables) > TABLES_KEPT:
        del _tables[next(iter(_tables))]
    return table

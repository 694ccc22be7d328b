"""What a tokenizer's ids mean: their bytes, the roles of special tokens, and the tokenizer's identity."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from storage_specs.document import canonical_json
from storage_specs.errors import TokenizerError
from storage_specs.token_alphabet import backend_of
from storage_specs.token_table import TokenTable, token_table

Role = Literal["bos", "eos", "end_of_turn", "other"]

# Tokens that close a turn in the well-known chat formats, most common first.
END_OF_TURN_NAMES = (
    "<|im_end|>",
    "<end_of_turn>",
    "<|eot_id|>",
    "<|end|>",
    "<|eot|>",
    "<turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|end_of_role|>",
)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A vocabulary as a cache keeps it, so that a student never needs the teacher's tokenizer.

    token_bytes: the bytes of every id, by id, None for holes. special_roles: the role of every special token, by id.
    """

    token_bytes: list[bytes | None]
    special_roles: dict[int, str]


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The bytes of every id inside running text, by id; None for ids that no token has.

    Special tokens have the bytes of their literal text. Marks that are not text are left out: `##` of WordPiece,
    `</w>` of word-end BPE; U+2581 of SentencePiece is a space. Raises TokenizerError without a fast backend.
    """
    return list(token_table(tokenizer).bytes)


def special_roles(tokenizer: Any) -> dict[int, Role]:
    """The role of every special token: {id: "bos" | "eos" | "end_of_turn" | "other"}, one role per id.

    `end_of_turn` is the special token that the tokenizer's own chat template writes right after an assistant turn, or
    else the first of `END_OF_TURN_NAMES` in the vocabulary. A token that is several things has the first of
    end_of_turn, eos, bos: SmolLM2's <|im_end|>, its EOS too, is `end_of_turn`. `token_with_role` follows the same rule
    backwards, so that an end row finds its token on both sides whichever roles they tell apart.
    """
    table = token_table(tokenizer)
    roles: dict[int, Role] = {token_id: "other" for token_id in sorted(table.special_ids)}
    for role, token_id in (
        ("bos", getattr(tokenizer, "bos_token_id", None)),
        ("eos", getattr(tokenizer, "eos_token_id", None)),
        ("end_of_turn", _end_of_turn(tokenizer, table)),
    ):
        if token_id is not None:
            roles[token_id] = role
    return roles


def token_with_role(roles: dict[int, Role], role: Role) -> int | None:
    """The id that plays `role` in `special_roles`' answer; eos and end_of_turn stand in for each other. None: no such.

    A tokenizer whose EOS closes turns has one token for both, so each is the other's second choice.
    """
    second = {"eos": "end_of_turn", "end_of_turn": "eos"}.get(role)
    for wanted in (role, second):
        for token_id, name in sorted(roles.items()):
            if name == wanted and wanted != "other":
                return token_id
    return None


def _end_of_turn(tokenizer: Any, table: TokenTable) -> int | None:
    """The special token right behind an assistant turn in the tokenizer's own template, or a well-known one."""
    if getattr(tokenizer, "chat_template", None):
        content = "zqAssistantTurnqz"
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}]
        try:
            _, _, behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(content)
        except Exception:  # a template that needs more than two plain turns: its name tells as well
            behind = ""
        for token_id in sorted(table.special_ids, key=lambda token_id: -len(table.bytes[token_id] or b"")):
            if behind.lstrip().startswith((table.bytes[token_id] or b"\xff").decode(errors="replace")):
                return token_id
    known = (table.backend.token_to_id(name) for name in END_OF_TURN_NAMES)
    return next((token_id for token_id in known if token_id in table.special_ids), None)


def spans_of_ids(token_bytes: Sequence[bytes | None], ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Byte spans of generated ids, which are never tokenised again: (T, 2) int64, offsets into the joined bytes.

    Raises TokenizerError where an id has no bytes, or where the joined bytes are not UTF-8 (such text has no document).
    """
    ids_T = np.asarray(ids, dtype=np.int64)
    if len(ids_T) and (ids_T.min() < 0 or ids_T.max() >= len(token_bytes)):
        raise TokenizerError(
            f"token ids {ids_T.min()}..{ids_T.max()} in a vocabulary of {len(token_bytes)}: wrong tokenizer"
        )
    spelled = [token_bytes[token_id] for token_id in ids_T]
    if None in spelled:
        raise TokenizerError(f"token id {ids_T[spelled.index(None)]} stands for no bytes: the document is left out")
    try:
        b"".join(spelled).decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(f"the generated tokens' bytes are not UTF-8 ({error}): the document is left out") from None
    ends_T = np.cumsum([len(piece) for piece in spelled], dtype=np.int64)
    return np.stack([np.concatenate([[0], ends_T[:-1]])[: len(ends_T)], ends_T], axis=1).astype(np.int64)


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 (hex) of everything that decides ids, as canonical JSON; truncation and padding are settings, left out."""
    state = json.loads(backend_of(tokenizer).to_str())
    for setting in ("truncation", "padding"):
        state.pop(setting, None)
    return hashlib.sha256(canonical_json(state)).hexdigest()

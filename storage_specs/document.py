"""A document: what teacher and student both see, and the coordinates that they share.

Text is addressed by (segment, byte): segment = index of the message, byte = offset in the UTF-8 bytes of `text`, which
is all message contents joined with nothing between. Templates and special tokens are not part of it.

Legend: T rows of one document, K top-k ranks, I ranks whose ids are kept, J tail bins.
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from storage_specs.checksum import crc32c

Kind = Literal["text", "completion", "chat"]
KINDS: tuple[Kind, ...] = ("text", "completion", "chat")
# What the world answers is read, never learned, whatever roles are scored.
TOOL_ROLES = ("tool", "function", "ipython")
HELD_OUT_MODULUS = 10
HELD_OUT_RULE = "crc32c(doc_id) % 10 == 0"
HELD_OUT_RULE_OF_GENERATED = "crc32c(prompt_id) % 10 == 0"  # so that all samples of a prompt are on one side


def canonical_json(value: Any) -> bytes:
    """The one byte string of a JSON value: sorted keys, no spaces, UTF-8. Digests are taken over it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message: who speaks, which bytes of the document's text, and whether those bytes are scored.

    `extra` holds what a chat template may want beside role and content (`name`, `tool_calls`, ...), JSON values only.
    """

    role: str
    byte_start: int
    byte_end: int
    scored: bool
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Document:
    """What is scored and learned from: a kind, a text, its messages. `text` is exactly the messages' contents joined.

    kind `text`: one message of role `text`, scored. `completion`: role `prompt`, then role `completion` (scored).
    `chat`: the conversation's own roles; assistant turns are scored, or those of other roles the corpus was read with.
    """

    kind: Kind
    text: str
    messages: tuple[Message, ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def doc_id(self) -> str:
        """sha256 (hex) of kind and messages: the same content has the same id in every cache."""
        data = self.text.encode()
        said = [[m.role, data[m.byte_start : m.byte_end].decode(), m.extra] for m in self.messages]
        return hashlib.sha256(canonical_json([self.kind, said])).hexdigest()

    @property
    def scored_spans(self) -> np.ndarray:
        """(S, 2) int64: the byte ranges of `text` whose tokens are scored, in order."""
        spans = [(m.byte_start, m.byte_end) for m in self.messages if m.scored]
        return np.array(spans, dtype=np.int64).reshape(-1, 2)

    def content(self, segment: int) -> str:
        """The text of message number `segment`."""
        message = self.messages[segment]
        return self.text.encode()[message.byte_start : message.byte_end].decode()


@dataclass(frozen=True, kw_only=True)
class CachedDocument(Document):
    """A document and the teacher's rows: one distribution per scored token, in text order.

    Row t says what the teacher expected after the byte prefix that ends at (`segment[t]`, `byte_start[t]`);
    `byte_end[t]` is where the token that really followed ends. End rows (`is_end`) have no bytes.

    segment, byte_start, byte_end: (T,) int64. is_end: (T,) bool. gold_logprob: (T,) float32, nats.
    probs: (T, K) float32, descending. tail_mass: (T,) float32 = 1 - probs.sum(1), never negative.
    token_ids: (T, I) int64, the ids of the first I ranks, or None. tail_bins: (T, J) float32 or None.
    """

    segment: np.ndarray
    byte_start: np.ndarray
    byte_end: np.ndarray
    is_end: np.ndarray
    gold_logprob: np.ndarray
    tail_mass: np.ndarray
    probs: np.ndarray
    token_ids: np.ndarray | None = None
    tail_bins: np.ndarray | None = None

    @property
    def unscored_bytes(self) -> int:
        """Bytes of scored spans that no row covers (a first token without a prefix, trailing dropped bytes)."""
        spans_S2 = self.scored_spans
        return int((spans_S2[:, 1] - spans_S2[:, 0]).sum() - (self.byte_end - self.byte_start).sum())


def is_held_out(doc_id: str) -> bool:
    """Whether a document is kept for evaluation and never trained on: crc32c of the ASCII hex id, modulo 10, is 0.

    The id is the one that the plan lists: of a text that the teacher wrote, the id of its prompt.
    """
    return crc32c(doc_id.encode("ascii")) % HELD_OUT_MODULUS == 0


def text_document(text: str, metadata: dict[str, Any] | None = None) -> Document:
    """A plain text, scored from end to end."""
    message = Message(role="text", byte_start=0, byte_end=len(text.encode()), scored=True)
    return Document(kind="text", text=text, messages=(message,), metadata=metadata or {})


def completion_document(prompt: str, completion: str, metadata: dict[str, Any] | None = None) -> Document:
    """A prompt that is only read, and a completion that is scored."""
    cut, end = len(prompt.encode()), len((prompt + completion).encode())
    messages = (
        Message(role="prompt", byte_start=0, byte_end=cut, scored=False),
        Message(role="completion", byte_start=cut, byte_end=end, scored=True),
    )
    return Document(kind="completion", text=prompt + completion, messages=messages, metadata=metadata or {})


def chat_document(
    conversation: list[dict[str, Any]],
    metadata: dict[str, Any] | None = None,
    score_roles: Collection[str] = ("assistant",),
) -> Document:
    """A conversation of `{"role": ..., "content": ..., ...}`; contents of `score_roles` are scored, tool results never.

    Tool calls are not content: a template writes them from `extra`, and nobody is scored on them.
    """
    messages, position = [], 0
    for turn in conversation:
        size = len((turn.get("content") or "").encode())
        extra = {key: value for key, value in turn.items() if key not in ("role", "content")}
        messages.append(
            Message(
                role=turn["role"],
                byte_start=position,
                byte_end=position + size,
                scored=turn["role"] in score_roles and turn["role"] not in TOOL_ROLES,
                extra=extra,
            )
        )
        position += size
    text = "".join(turn.get("content") or "" for turn in conversation)
    return Document(kind="chat", text=text, messages=tuple(messages), metadata=metadata or {})

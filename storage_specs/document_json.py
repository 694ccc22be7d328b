"""What a store keeps of a document beside its text and rows: kind, messages and metadata, as JSON.

A message is {"role": string, "byte_start": int, "byte_end": int, "scored": bool, "extra": object}.
"""

import json
from dataclasses import asdict
from typing import Any

from storage_specs.document import KINDS, Document, Message, canonical_json

_MESSAGE_TYPES = {"role": str, "byte_start": int, "byte_end": int, "scored": bool, "extra": dict}


def messages_to_json(document: Document) -> list[dict[str, Any]]:
    """The document's messages as JSON values."""
    return [asdict(message) for message in document.messages]


def document_to_bytes(document: Document) -> bytes:
    """A whole document, text included, as JSON."""
    return canonical_json([document.kind, document.text, messages_to_json(document), document.metadata])


def document_from_bytes(data: bytes) -> Document:
    """The document that `document_to_bytes` wrote. Raises ValueError."""
    return document_from_json(*json.loads(data))


def document_from_json(kind: Any, text: str, messages: Any, metadata: Any) -> Document:
    """The document of decoded JSON values. Raises ValueError where they are not what `messages_to_json` makes."""
    if kind not in KINDS:
        raise ValueError(f"document kind {kind!r:.50} is none of {', '.join(KINDS)}")
    if not isinstance(messages, list) or not isinstance(metadata, dict):
        raise ValueError("a document's messages must be a list and its metadata an object")
    for message in messages:
        if not isinstance(message, dict) or {key: type(item) for key, item in message.items()} != _MESSAGE_TYPES:
            raise ValueError(f"a message must have {', '.join(_MESSAGE_TYPES)}; found {message!r:.200}")
    return Document(kind=kind, text=text, messages=tuple(Message(**message) for message in messages), metadata=metadata)

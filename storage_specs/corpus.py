"""A corpus becomes documents.

Fields of a record, in this order of precedence (`kind` forces one):
- `messages`: a list of {"role", "content", ...}: a chat; turns of the scored roles are (by default the assistant's).
  Tool results never are, and tool calls are context: a template writes them, and they have no bytes in the text.
- `prompt` + `completion`: two strings, the completion is scored; or two lists of messages: a chat in which only the
  completion's turns are scored.
- `text`: a plain text, scored from end to end.
Other fields become the document's metadata where they are JSON values; a field that is not is left out with a warning.
"""

import dataclasses
import warnings
from collections.abc import Collection, Iterator
from typing import Any

from storage_specs.document import (
    KINDS,
    Document,
    canonical_json,
    chat_document,
    completion_document,
    text_document,
)
from storage_specs.errors import ConfigError, CorpusError
from storage_specs.records import Record, read_records

FIELDS_OF_KIND = {"chat": ("messages",), "completion": ("prompt", "completion"), "text": ("text",)}


def read_corpus(
    corpus: str,
    *,
    kind: str = "auto",
    split: str | None = None,
    subset: str | None = None,
    max_documents: int | None = None,
    min_bytes: int = 0,
    score_roles: Collection[str] = ("assistant",),
) -> Iterator[Document]:
    """The documents of a corpus, in its own order.

    corpus: a .jsonl/.json (.gz), .parquet, .txt or .md file, a folder of them, a saved `datasets` folder or a hub name.
    kind: text | completion | chat, or auto = by the fields of each record.
    min_bytes: documents whose text has fewer UTF-8 bytes are passed over; max_documents counts what is left.
    score_roles: whose turns of a chat are scored.

    Raises CorpusError with `file:line` for what cannot be read, and for a corpus without any document.
    """
    if kind not in ("auto", *KINDS):
        raise ConfigError(f"kind is {kind!r}, but must be auto, {', '.join(KINDS)}")
    given = kept = 0
    left_out: set[str] = set()
    for record in read_records(corpus, split, subset):
        if max_documents is not None and kept >= max_documents:
            return
        given += 1
        document = document_of(record, kind, left_out, score_roles)
        if len(document.text.encode()) >= min_bytes:
            kept += 1
            yield document
    if not kept:
        few = f": none of its {given} documents has {min_bytes} bytes" if given else ": it holds no record"
        raise CorpusError(f"corpus {corpus} is empty{few}")


def document_of(
    record: Record,
    kind: str = "auto",
    left_out: set[str] | None = None,
    score_roles: Collection[str] = ("assistant",),
) -> Document:
    """One record as a document. `left_out` collects the field names already warned of. Raises CorpusError."""
    kind = _kind(record) if kind == "auto" else kind
    missing = [name for name in FIELDS_OF_KIND[kind] if record.fields.get(name) is None]
    if missing:
        raise CorpusError(f"corpus {record.place}: a {kind} record needs the field {missing[0]!r}")
    values = [record.fields[name] for name in FIELDS_OF_KIND[kind]]
    metadata = metadata_of(record, FIELDS_OF_KIND[kind], set() if left_out is None else left_out)
    if record.fields.get("tools"):
        raise CorpusError(f"corpus {record.place}: `tools` are not rendered; write them into a system message instead")
    if kind == "chat":
        return chat_document(conversation_of(values[0], record.place, "messages"), metadata, score_roles)
    if kind == "completion" and isinstance(values[0], list) and isinstance(values[1], list):
        return _chat_completion(*values, record.place, metadata, score_roles)
    for name, value in zip(FIELDS_OF_KIND[kind], values, strict=True):
        require_text(value, record.place, name)
    return completion_document(*values, metadata) if kind == "completion" else text_document(values[0], metadata)


def _kind(record: Record) -> str:
    for kind, names in FIELDS_OF_KIND.items():
        if all(record.fields.get(name) is not None for name in names):
            return kind
    found = ", ".join(map(repr, record.fields)) or "none"
    raise CorpusError(
        f"corpus {record.place}: needs the field `text`, or `prompt` and `completion`, or `messages`; found: {found}"
    )


def require_text(value: Any, place: str, name: str) -> None:
    if not isinstance(value, str):
        raise CorpusError(f"corpus {place}: {name} must be a string, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"corpus {place}: {name} holds a lone surrogate ({value[error.start]!r} at character {error.start}), "
            "which is no text and has no UTF-8 bytes; repair the text where it was cut"
        ) from None


def conversation_of(turns: Any, place: str, name: str) -> list[dict[str, Any]]:
    """The turns of a chat, checked; keys whose value is None (Arrow's fill for absent keys) are dropped."""
    if not isinstance(turns, list) or not turns:
        raise CorpusError(f"corpus {place}: {name} must be a list of messages, found {_short(turns)}")
    conversation = []
    for number, turn in enumerate(turns):
        where = f"{name}[{number}]"
        if not isinstance(turn, dict):
            raise CorpusError(f"corpus {place}: {where} must be an object with role and content, found {_short(turn)}")
        turn = {key: value for key, value in turn.items() if value is not None}
        require_text(turn.get("role"), place, f"{where}.role")
        if "content" in turn or "tool_calls" not in turn:
            require_text(turn.get("content"), place, f"{where}.content")
        try:
            canonical_json(turn)
        except (TypeError, ValueError) as error:
            raise CorpusError(f"corpus {place}: {where} holds what is no JSON text: {error}") from None
        conversation.append(turn)
    return conversation


def _chat_completion(
    prompt: Any, completion: Any, place: str, metadata: dict[str, Any], score_roles: Collection[str]
) -> Document:
    """A conversational prompt is only read, whatever assistant turns it has."""
    before = conversation_of(prompt, place, "prompt")
    document = chat_document(before + conversation_of(completion, place, "completion"), metadata, score_roles)
    messages = tuple(
        dataclasses.replace(message, scored=message.scored and number >= len(before))
        for number, message in enumerate(document.messages)
    )
    return dataclasses.replace(document, messages=messages)


def metadata_of(record: Record, used: tuple[str, ...], left_out: set[str]) -> dict[str, Any]:
    metadata = {}
    for name, value in record.fields.items():
        if name in used or value is None:
            continue
        try:
            canonical_json({name: value})
        except (TypeError, ValueError):
            if name not in left_out:
                left_out.add(name)
                warnings.warn(
                    f"corpus {record.place}: field {name!r} is no JSON value ({_short(value)}) and is left out of the "
                    "metadata, here and in later records; convert it to text or numbers to keep it",
                    stacklevel=2,
                )
        else:
            metadata[name] = value
    return metadata


def _short(value: Any) -> str:
    return f"{type(value).__name__} {ascii(value)[:40]}"

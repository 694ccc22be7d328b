"""A corpus becomes prompts, for mode generate.

`messages` up to the last turn that is not the assistant's, a `prompt` (a string or a list of messages), or the `prompt`
of a completion record: what an assistant said at the end is left out, because the teacher writes it anew.

Legend: L tokens of a prompt.
"""

from typing import Any

import numpy as np

from storage_specs.corpus import conversation_of, metadata_of, require_text
from storage_specs.document import Document, Message, chat_document
from storage_specs.encoding import encode
from storage_specs.errors import ChatTemplateError, CorpusError
from storage_specs.records import Record, read_records
from storage_specs.rendering import prefix_ids

FIELDS = ("messages", "prompt", "completion")


def read_prompts(
    corpus: str, *, split: str | None = None, subset: str | None = None, max_documents: int | None = None
) -> list[Document]:
    """The prompts of a corpus, in its own order: documents without the message that the teacher will write.

    max_documents: the first so many. Raises CorpusError with `file:line`.
    """
    left_out: set[str] = set()
    prompts = []
    for record in read_records(corpus, split, subset):
        if max_documents is not None and len(prompts) >= max_documents:
            break
        prompts.append(prompt_document(record, left_out))
    if not prompts:
        raise CorpusError(f"corpus {corpus} is empty: it holds no record")
    return prompts


def prompt_document(record: Record, left_out: set[str]) -> Document:
    """One record as a prompt. Raises CorpusError."""
    metadata, place = metadata_of(record, FIELDS, left_out), record.place
    given = next((name for name in FIELDS[:2] if record.fields.get(name) is not None), None)
    if given is None:
        raise CorpusError(
            f"corpus {place}: mode generate needs the field `prompt` or `messages`; `text` is scored as it is"
        )
    if record.fields.get("tools"):
        raise CorpusError(f"corpus {place}: `tools` are not rendered; write them into a system message instead")
    value = record.fields[given]
    if given == "prompt" and not isinstance(value, list):
        require_text(value, place, "prompt")
        message = Message(role="prompt", byte_start=0, byte_end=len(value.encode()), scored=False)
        return Document(kind="completion", text=value, messages=(message,), metadata=metadata)
    turns = conversation_of(value, place, given)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns:
        raise CorpusError(f"corpus {place}: {given} holds nothing that the assistant could answer")
    return chat_document(turns, metadata, score_roles=())


def turns_of(document: Document) -> list[dict[str, Any]]:
    """The messages of a chat, as templates and chat endpoints take them."""
    return [
        {"role": message.role, "content": document.content(number)} | message.extra
        for number, message in enumerate(document.messages)
    ]


def prompt_text(tokenizer: Any, document: Document, chat_template: str | None, kwargs: dict[str, Any]) -> str:
    """What the teacher reads: the prompt, or the conversation with the beginning of the assistant's turn."""
    if document.kind != "chat":
        return document.text
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise ChatTemplateError(
            "the teacher's tokenizer has no chat template, and the corpus has chats: give one with --chat-template FILE"
        )
    try:
        return tokenizer.apply_chat_template(
            turns_of(document),
            chat_template=chat_template,
            tokenize=False,
            add_generation_prompt=True,
            **kwargs,
        )
    except Exception as error:  # whatever a template raises: its own raise_exception, or jinja2's errors
        raise ChatTemplateError(
            f"prompt {document.doc_id[:12]}: the chat template refused it: {' '.join(str(error).split())}"
        ) from error


def prompt_ids(tokenizer: Any, text: str, *, chat: bool, bos_token: str | None) -> np.ndarray:
    """(L,) int64: the prompt's tokens with what the tokenizer puts in front of every text (or `bos_token`), once.

    Templates write their own prefix, as in `render`: there only a `bos_token` that was asked for is added.
    """
    prefix_P = prefix_ids(tokenizer, bos_token)
    ids_T = encode(tokenizer, [text], add_special_tokens=False)[0].ids
    repeated = chat and len(prefix_P) and (ids_T[: len(prefix_P)] == prefix_P).all()
    if repeated or (chat and bos_token is None):
        return ids_T
    return np.concatenate([prefix_P, ids_T])

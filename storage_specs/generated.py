"""Documents that the teacher wrote itself: their last message answers a prompt of the plan.

The plan cannot know such documents' ids; it lists the ids of their prompts, once per sample, and the commit records
hold both. A completion whose bytes are no UTF-8 is refused: its document stays, empty and without rows, and is counted.
"""

from collections.abc import Sequence
from typing import Any

from storage_specs.document import Document

KEY = "generation"  # in a document's metadata: how its completion came about
REFUSED = "refused"  # as `finish_reason` there


def prompt_of(document: Document) -> Document:
    """Everything before the last message, as a document. Its doc_id is what the plan lists."""
    before = document.messages[:-1]
    end = before[-1].byte_end if before else 0
    return Document(
        kind=document.kind,
        text=document.text.encode()[:end].decode(),
        messages=before,
        metadata={key: value for key, value in document.metadata.items() if key != KEY},
    )


def generation_record(documents: Sequence[Document]) -> dict[str, Any]:
    """What a commit record says of generated documents: {"prompt_ids": [...], "refused": count}."""
    return {
        "prompt_ids": [prompt_of(document).doc_id for document in documents],
        "refused": sum(document.metadata.get(KEY, {}).get("finish_reason") == REFUSED for document in documents),
    }

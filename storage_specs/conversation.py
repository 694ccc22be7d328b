"""Where a chat template put each message's content: proven, or refused.

The template is rendered once with a unique word in every content's place (the skeleton) and once for real. The real
rendering must be the skeleton with the contents in those places, as they are or with white space trimmed at their
ends; anything else (a template that rewrites contents) is an error, because bytes would be attributed by guess.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from storage_specs.document import Document
from storage_specs.errors import ChatTemplateError

# What templates are known to do at the ends of a content; "as it is" first.
TRIMS: tuple[Callable[[str], str], ...] = (
    lambda content: content,
    lambda content: content.strip(),
    lambda content: content.strip("\n"),
    lambda content: content.lstrip("\n"),
    lambda content: content.rstrip("\n"),
    lambda content: content.lstrip(),
    lambda content: content.rstrip(),
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Bytes [start, end) of the rendering are the document's bytes from `text_start` on, in message `segment`."""

    segment: int
    start: int
    end: int
    text_start: int


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """A rendered conversation and where its contents stand, in the order of the rendering."""

    text: str
    places: tuple[Place, ...]


def chat_template_digest(template: str | None) -> str | None:
    """sha256 (hex) of a template's UTF-8 bytes; None for none."""
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()


def render_conversation(
    tokenizer: Any, document: Document, chat_template: str | None, chat_template_kwargs: dict[str, Any] | None
) -> Rendering:
    """Render a chat document with a template (by default the tokenizer's own) and find every content in it.

    Raises ChatTemplateError: no template, a template that fails, one that alters, repeats or drops scored contents.
    """
    if not hasattr(tokenizer, "apply_chat_template"):
        raise ChatTemplateError(
            f"{type(tokenizer).__name__} cannot render chat documents: load the tokenizer with transformers"
        )
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ChatTemplateError(
            f"tokenizer {name} has no chat template, and the corpus has chat documents: "
            "give one with --chat-template FILE"
        )
    contents = [document.content(segment) for segment in range(len(document.messages))]

    def apply(said: list[str]) -> str:
        turns = [
            {"role": message.role, "content": content} | message.extra
            for message, content in zip(document.messages, said, strict=True)
        ]
        try:
            return tokenizer.apply_chat_template(
                turns, chat_template=chat_template, tokenize=False, **(chat_template_kwargs or {})
            )
        except Exception as error:  # whatever a template raises: its own raise_exception, or jinja2's errors
            raise ChatTemplateError(
                f"document {document.doc_id[:12]}: the chat template refused it: {' '.join(str(error).split())}"
            ) from error

    actual = apply(contents)
    # Some templates treat an empty content as none at all: then it stays empty in the skeleton too, without a place.
    for standing_in in (range(len(contents)), [n for n, content in enumerate(contents) if content.strip()]):
        words = {n: _word(n, actual) for n in standing_in}
        skeleton = apply([words.get(n, content) for n, content in enumerate(contents)])
        places = _match(document, contents, words, skeleton, actual)
        if places is not None:
            return Rendering(text=actual, places=places)
    raise ChatTemplateError(
        f"document {document.doc_id[:12]}: the chat template alters the contents of messages (more than white space at "
        "their ends), drops a scored one or repeats one, so its bytes have no sure place: use a template that writes "
        "contents as they are (--chat-template FILE), or leave the document out"
    )


def _word(segment: int, rendering: str) -> str:
    """A word that stands for a content and occurs nowhere in the rendering."""
    word = f"zq{segment}Content{segment}qz"
    while word in rendering:
        word = f"zq{word}qz"
    return word


def _match(
    document: Document, contents: list[str], words: dict[int, str], skeleton: str, actual: str
) -> tuple[Place, ...] | None:
    """The places of all contents, where `actual` is `skeleton` with (trimmed) contents for words; else None."""
    found: list[tuple[int, int]] = []  # (position in the skeleton, segment)
    for segment, word in words.items():
        times = skeleton.count(word)
        if times > 1 or (times == 0 and document.messages[segment].scored):
            return None
        if times:
            found.append((skeleton.index(word), segment))
    found.sort()
    scored = [segment for _, segment in found if document.messages[segment].scored]
    if scored != sorted(scored):
        return None
    pieces, segments, position = [], [segment for _, segment in found], 0
    for at, segment in found:
        pieces.append(skeleton[position:at])
        position = at + len(words[segment])
    pieces.append(skeleton[position:])
    said = _substitute(pieces, [contents[segment] for segment in segments], actual)
    return None if said is None else _places(document, contents, pieces, segments, said)


def _substitute(pieces: list[str], contents: list[str], actual: str) -> list[str] | None:
    """What stands between the template's pieces in `actual`: each content or a trimmed form of it; None if neither."""
    if not contents:
        return [] if pieces == [actual] else None
    # Depth first over the trims of each content; one way in all but the most contrived renderings.
    stack: list[tuple[int, int, tuple[str, ...]]] = [(0, 0, ())]
    while stack:
        position, n, said = stack.pop()
        if not actual.startswith(pieces[n], position):
            continue
        position += len(pieces[n])
        if n == len(contents):
            if position == len(actual):
                return list(said)
            continue
        for form in reversed(dict.fromkeys(trim(contents[n]) for trim in TRIMS)):
            if actual.startswith(form, position):
                stack.append((position + len(form), n + 1, (*said, form)))
    return None


def _places(
    document: Document, contents: list[str], pieces: list[str], segments: list[int], said: list[str]
) -> tuple[Place, ...]:
    """Byte coordinates of what was said, in the rendering and in the document."""
    places, position = [], 0
    for piece, segment, form in zip(pieces, segments, said, strict=False):
        position += len(piece.encode())
        size = len(form.encode())
        trimmed = len(contents[segment][: contents[segment].index(form)].encode())
        places.append(
            Place(
                segment=segment,
                start=position,
                end=position + size,
                text_start=document.messages[segment].byte_start + trimmed,
            )
        )
        position += size
    return tuple(places)

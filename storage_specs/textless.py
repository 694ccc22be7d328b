"""Caches without text: what they keep of a document, and a corpus that gives the rest again.

For corpora that may not be copied. Kept are a document's id, its kind, its messages' roles, byte ranges and `scored`
flags; text, `extra` and metadata are not. The id is the sha256 of kind and contents, so a corpus record is the document
where its own id is the same, and what is read again is what was scored, or nothing.
"""

import os
import tempfile
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace

from storage_specs.corpus import FIELDS_OF_KIND, document_of
from storage_specs.document import Document
from storage_specs.document_json import document_from_bytes, document_to_bytes
from storage_specs.errors import CorpusError, MalformedObjectError
from storage_specs.records import read_records


def stripped(document: Document) -> Document:
    """The document without its text, its messages' `extra` and its metadata."""
    return Document(
        kind=document.kind, text="", messages=tuple(replace(message, extra={}) for message in document.messages)
    )


def restored(document: Document, original: Document) -> Document:
    """A stripped document with what the corpus' document of the same id has. Raises MalformedObjectError."""
    ranges = [(message.role, message.byte_start, message.byte_end) for message in document.messages]
    if ranges != [(message.role, message.byte_start, message.byte_end) for message in original.messages]:
        raise MalformedObjectError(f"document {original.doc_id}: its messages are not those of the corpus")
    messages = zip(document.messages, original.messages, strict=True)
    return replace(
        original,
        messages=tuple(replace(message, extra=full.extra) for message, full in messages),
    )


class CorpusTexts:
    """The documents of a corpus by their ids; they lie in an unnamed temporary file, and only their places in memory.

    corpus: what `records.read_records` takes, or documents. wanted: the ids to be kept. A fork may share it. Raises
    CorpusError: a corpus that cannot be read, or that lacks some of them.
    """

    def __init__(self, corpus: str | os.PathLike[str] | Sequence[Document], wanted: Collection[str]) -> None:
        self.corpus = corpus
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  open as long as this object lives
        weakref.finalize(self, self._file.close)
        self._places: dict[str, tuple[int, int]] = {}
        missing = set(wanted)
        for document in _documents(corpus):
            doc_id = document.doc_id
            if doc_id in missing:
                data = document_to_bytes(document)
                self._places[doc_id] = (self._file.tell(), len(data))
                self._file.write(data)
                missing.remove(doc_id)
        self._file.flush()
        if missing:
            name = corpus if isinstance(corpus, str | os.PathLike) else "given"
            raise CorpusError(
                f"corpus {name}: {len(missing)} of the cache's {len(set(wanted))} documents are not in it (the first "
                f"is {min(missing)}): give the corpus that the cache was built from, unaltered"
            )

    def __getitem__(self, doc_id: str) -> Document:
        place, size = self._places[doc_id]
        return document_from_bytes(os.pread(self._file.fileno(), size, place))


def _documents(corpus: str | os.PathLike[str] | Iterable[Document]) -> Iterator[Document]:
    """Every document that a record may be: which kind the build took it for is not known here."""
    if not isinstance(corpus, str | os.PathLike):
        yield from corpus
        return
    for record in read_records(os.fspath(corpus)):
        for kind, names in FIELDS_OF_KIND.items():
            if all(record.fields.get(name) is not None for name in names):
                yield document_of(record, kind)

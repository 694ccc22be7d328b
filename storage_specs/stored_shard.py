"""A shard as both stores keep it: documents, their text, and named arrays of numbers with one entry per row.

What the arrays mean is the business of `row_coding`; how they become bytes, of a store.

Legend: D documents of a shard, N rows of a shard.
"""

from dataclasses import dataclass

import numpy as np

from storage_specs.codecs.base import ArraySpec
from storage_specs.document import Document

MAX_HEADER_BYTES = 1 << 28  # of all documents' messages and metadata in a shard, as JSON


@dataclass(frozen=True, kw_only=True)
class ShardArrays:
    """Which arrays and tables a shard has, or a reader wants of it.

    arrays: in storage order. tables: the most entries that each may have, by name.
    """

    arrays: tuple[ArraySpec, ...]
    tables: dict[str, int]

    @property
    def names(self) -> frozenset[str]:
        return frozenset({*(spec.name for spec in self.arrays), *self.tables})


@dataclass(frozen=True, kw_only=True)
class ShardSize:
    """How much a shard, or one document of it, holds: documents, rows, bytes of text (UTF-8). Known before decoding."""

    documents: int
    rows: int
    text_bytes: int


@dataclass(frozen=True, kw_only=True)
class StoredShard:
    """documents: D of them. document_rows: (D,) int64, rows of each. arrays: by name, all with N = their sum entries.

    tables: arrays of the whole shard by name, (any length,) uint32, whatever documents are selected.
    """

    documents: tuple[Document, ...]
    document_rows: np.ndarray
    arrays: dict[str, np.ndarray]
    tables: dict[str, np.ndarray]

    @property
    def text_bytes(self) -> np.ndarray:
        """(D,) int64: UTF-8 bytes of each document's text."""
        return np.array([len(document.text.encode()) for document in self.documents], dtype=np.int64)

    @property
    def size(self) -> ShardSize:
        return ShardSize(
            documents=len(self.documents),
            rows=int(self.document_rows.sum()),
            text_bytes=int(self.text_bytes.sum()),
        )


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Consecutive documents of a shard, and where their rows and their bytes of text lie in it."""

    documents: slice
    rows: slice
    text: slice

    @classmethod
    def everything(cls, size: ShardSize) -> "Selection":
        return cls(documents=slice(0, size.documents), rows=slice(0, size.rows), text=slice(0, size.text_bytes))

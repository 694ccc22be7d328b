"""Reading a cache: `open_cache(path)`, then documents by number. Nothing is decoded before its bytes verify."""

import operator
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from storage_specs import shard_table, vocabulary_table
from storage_specs.columns import Columns
from storage_specs.document import CachedDocument, Document
from storage_specs.errors import ConfigError, CorpusError, MalformedObjectError
from storage_specs.manifest import Manifest, read_manifest
from storage_specs.object_roots import is_url, open_objects
from storage_specs.objects import Objects
from storage_specs.shard_reading import WRITTEN_WRONGLY, ShardReader
from storage_specs.shard_table import ShardTable
from storage_specs.textless import CorpusTexts, restored

if TYPE_CHECKING:
    from storage_specs.vocabulary import Vocabulary

DECODED_SHARDS_KEPT = 4  # per open cache; a row costs 4 bytes per value and 8 per id
RECORDS_KEPT = 64  # of shards whose documents are read one by one


def open_cache(
    path: str | os.PathLike[str],
    ids: bool = True,
    *,
    corpus: "str | os.PathLike[str] | Sequence[Document] | None" = None,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
) -> "Cache":
    """A finished cache, at a folder or URL. With `ids=False` the ids' objects are never opened and `token_ids` is None.

    Reads and verifies manifest.json and shards.parquet; shards are read when they are asked for. corpus: what gives the
    texts of a cache that keeps none (`textless.CorpusTexts`), read once, here; without it no document of such a cache
    can be read. What is read from a URL is kept in the folder `cache_dir` (default: the environment's
    TEACH_ONCE_CACHE_DIR, else nothing is kept), at most `cache_bytes` of it (default: TEACH_ONCE_CACHE_BYTES, else 32
    GiB); the processes of a host share it. Raises NotACacheError, IncompleteCacheError, SpecVersionError, the kinds of
    CorruptCacheError, CorpusError (it lacks documents), StoreUnavailableError, StoreAccessError, and ConfigError for
    URLs of no known store.
    """
    return cache_of(_objects_of(path, cache_dir, cache_bytes), ids, corpus)


def cache_of(
    objects: Objects, ids: bool = True, corpus: "str | os.PathLike[str] | Sequence[Document] | None" = None
) -> "Cache":
    """The finished cache of these objects: what `open_cache` returns, and raises."""
    manifest = read_manifest(objects)
    table = shard_table.table_from_object(objects.fetch(manifest.shards), manifest.counts["documents"])
    counts = {
        "documents": len(table.rows),
        "rows": int(table.rows.sum()),
        "empty_documents": int((table.rows == 0).sum()),
        "text_bytes": int(table.text_bytes.sum()),
    }
    for name, found in counts.items():
        if manifest.counts[name] != found:
            raise MalformedObjectError(
                f"{shard_table.NAME}: {found} {name}, but the manifest counts {manifest.counts[name]}; "
                f"{WRITTEN_WRONGLY}"
            )
    return Cache(objects, manifest, table, ids, corpus)


def _objects_of(
    path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None, cache_bytes: int | None
) -> Objects:
    """The objects at a place, behind a disk cache where the place is remote and a folder for it is named."""
    objects = open_objects(path)
    cache_dir = cache_dir or os.environ.get("TEACH_ONCE_CACHE_DIR")
    if not cache_dir or not is_url(path):
        return objects
    from storage_specs.disk_cache import DEFAULT_BYTES, DiskCache

    if cache_bytes is None:
        text = os.environ.get("TEACH_ONCE_CACHE_BYTES", str(DEFAULT_BYTES))
        try:
            cache_bytes = int(text)
        except ValueError:
            raise ConfigError(f"TEACH_ONCE_CACHE_BYTES is {text!r}: expected a number of bytes") from None
    return DiskCache(objects, cache_dir, cache_bytes)


class Cache:
    """An opened cache: a sequence of documents, and the same documents by shard. Made by `open_cache`.

    path: pathlib.Path, or the URL as str. manifest: Manifest. rows_D, text_bytes_D: (D,) int64, held_out_D: (D,) bool,
    of every document, in order. documents_per_shard: (S,) int64. None of these reads a shard. The last few decoded
    shards are kept (`DECODED_SHARDS_KEPT`). Threads may share it; a copy in another process (fork or pickle) works.
    """

    def __init__(
        self,
        objects: Objects,
        manifest: Manifest,
        table: ShardTable,
        ids: bool,
        corpus: "str | os.PathLike[str] | Sequence[Document] | None" = None,
    ) -> None:
        self.path, self.manifest = objects.root, manifest
        self.rows_D, self.text_bytes_D, self.held_out_D = table.rows, table.text_bytes, table.held_out
        self.documents_per_shard = table.documents_per_shard
        self.with_ids = ids and manifest.k_ids > 0
        self.table = table
        self.reader = ShardReader(objects=objects, manifest=manifest, table=table, with_ids=self.with_ids)
        self._objects = objects
        # No lock that a fork could leave taken: two threads at most read a shard twice.
        self._held: OrderedDict[int, Columns] = OrderedDict()
        self._record = lru_cache(RECORDS_KEPT)(self.reader.record)
        self._corpus = None if manifest.text else corpus
        self._texts = None if self._corpus is None else CorpusTexts(self._corpus, self.doc_ids)

    def __len__(self) -> int:
        return len(self.rows_D)

    def __getitem__(self, number: int) -> CachedDocument:
        """One document, read alone unless its shard is already decoded. Raises IndexError, CorruptCacheError's kinds.

        Reading many documents of one shard is faster by `streamed` or `shard`.
        """
        number = self._checked(number)
        shard = self._shard_of(number)
        if shard in self._held:
            return self.streamed(number)
        return self._with_texts(self.reader.document(shard, self._record(shard), number), number).document(0)

    def streamed(self, number: int) -> CachedDocument:
        """One document, by way of its whole shard, which is kept. Raises IndexError, CorruptCacheError's kinds."""
        number = self._checked(number)
        shard = self._shard_of(number)
        return self.columns(shard).document(number - int(self.table.first_document[shard]))

    def __iter__(self) -> Iterator[CachedDocument]:
        for shard in range(len(self.documents_per_shard)):
            yield from self.shard(shard)

    def __repr__(self) -> str:
        return f"<Cache {self.path}: {len(self)} documents, {self.manifest.counts['rows']} rows, k {self.manifest.k}>"

    def __reduce__(self) -> tuple:
        return cache_of, (self._objects, self.with_ids, self._corpus)

    def shard(self, shard: int) -> list[CachedDocument]:
        """All documents of one shard."""
        columns = self.columns(shard)
        return [columns.document(number) for number in range(len(columns.documents))]

    def columns(self, shard: int) -> Columns:
        """One shard, verified and decoded; do not write into it. Raises the kinds of CorruptCacheError."""
        if not 0 <= shard < len(self.documents_per_shard):
            raise IndexError(f"shard {shard} of a cache of {len(self.documents_per_shard)}")
        columns = self._held.get(shard)
        if columns is None:
            columns = self._held[shard] = self.read_columns(shard)
        with suppress(KeyError):  # another thread may have let go of it
            self._held.move_to_end(shard)
            while len(self._held) > DECODED_SHARDS_KEPT:
                self._held.popitem(last=False)
        return columns

    def read_columns(self, shard: int) -> Columns:
        """One shard, verified, decoded and not kept. Raises the kinds of CorruptCacheError, and CorpusError."""
        return self._with_texts(self.reader.columns(shard), int(self.table.first_document[shard]))

    @cached_property
    def doc_ids(self) -> list[str]:
        """The ids of all documents, in order; read when they are first asked for. Raises CorruptCacheError's kinds."""
        return shard_table.doc_ids_from_object(self._objects.fetch(self.manifest.documents), len(self))

    @cached_property
    def vocabulary(self) -> "Vocabulary | None":
        """The teacher's words and special roles; None where no ids are kept. Raises CorruptCacheError's kinds."""
        if self.manifest.vocabulary is None:
            return None
        data = self._objects.fetch(self.manifest.vocabulary)
        try:
            return vocabulary_table.vocabulary_from_bytes(data, self.manifest.vocab_size)
        except ValueError as error:
            raise MalformedObjectError(f"{self.manifest.vocabulary.name}: {error}; {WRITTEN_WRONGLY}") from None

    def _with_texts(self, columns: Columns, first: int) -> Columns:
        """The columns of documents from number `first` on, with the texts that the cache does not keep."""
        if self.manifest.text:
            return columns
        if self._texts is None:
            raise CorpusError(
                f"{self.path} keeps no texts (it was built with --no_text): give the corpus that it was built from, by "
                "--corpus, or open_cache(..., corpus=...)"
            )
        documents = tuple(
            restored(document, self._texts[self.doc_ids[first + number]])
            for number, document in enumerate(columns.documents)
        )
        return replace(columns, documents=documents)

    def _checked(self, number: int) -> int:
        number = operator.index(number)
        if not -len(self) <= number < len(self):
            raise IndexError(f"document {number} of a cache of {len(self)}")
        return number % len(self)

    def _shard_of(self, number: int) -> int:
        return int(np.searchsorted(self.table.first_document, number, side="right")) - 1

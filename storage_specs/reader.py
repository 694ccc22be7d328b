"""Reading a cache: `open_cache(path)`, then documents by number. Nothing is decoded before its bytes verify."""

import operator
import os
from collections.abc import Iterator
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np

from storage_specs import shard_table, vocabulary_table
from storage_specs.column_rules import problem_of, size_problem
from storage_specs.columns import Columns
from storage_specs.document import CachedDocument
from storage_specs.errors import MalformedObjectError
from storage_specs.manifest import Manifest, read_manifest
from storage_specs.objects import Objects, open_objects
from storage_specs.shard_record import record_name
from storage_specs.shard_table import ShardTable
from storage_specs.stores import shard_store, stem_of

if TYPE_CHECKING:
    from storage_specs.vocabulary import Vocabulary

DECODED_SHARDS_KEPT = 4  # per open cache; a shard in memory costs its decompressed columns (values as float16)
_WRITTEN_WRONGLY = "the cache was written wrongly: rebuild it, and please report this"


def open_cache(path: str | os.PathLike[str], ids: bool = True) -> "Cache":
    """A finished cache, at a folder or URL. With `ids=False` the ids' objects are never opened and `token_ids` is None.

    Reads and verifies manifest.json and shards.parquet; shards are read when they are asked for. Raises NotACacheError,
    IncompleteCacheError, SpecVersionError, the kinds of CorruptCacheError, and ConfigError for URLs of no known store.
    """
    objects = open_objects(path)
    manifest = read_manifest(objects)
    table = shard_table.table_from_object(objects.fetch(manifest.shards))
    counts = {
        "documents": len(table.doc_ids),
        "rows": int(table.rows.sum()),
        "empty_documents": int((table.rows == 0).sum()),
        "text_bytes": int(table.text_bytes.sum()),
    }
    for name, found in counts.items():
        if manifest.counts[name] != found:
            raise MalformedObjectError(
                f"{shard_table.NAME}: {found} {name}, but the manifest counts {manifest.counts[name]}; "
                f"{_WRITTEN_WRONGLY}"
            )
    return Cache(objects, manifest, table, ids)


class Cache:
    """An opened cache: a sequence of documents, and the same documents by shard. Made by `open_cache`.

    path: pathlib.Path, or the URL as str. manifest: Manifest. doc_ids: of every document, in order. rows_D,
    text_bytes_D: (D,) int64 of every document. documents_per_shard: list of int. None of these reads a shard. The last
    few decoded shards are kept (`DECODED_SHARDS_KEPT`). Threads may share it; a copy in another process (fork or
    pickle) works too.
    """

    def __init__(self, objects: Objects, manifest: Manifest, table: ShardTable, ids: bool) -> None:
        self.path, self.manifest = objects.root, manifest
        self.doc_ids: list[str] = list(table.doc_ids)
        self.rows_D, self.text_bytes_D = table.rows, table.text_bytes
        self.documents_per_shard: list[int] = list(table.documents_per_shard)
        self.with_ids = ids and manifest.k_ids > 0
        self.table = table
        self._objects = objects
        # lru_cache takes no lock that a fork could leave taken; two threads at most read a shard twice.
        self._columns = lru_cache(DECODED_SHARDS_KEPT)(
            partial(read_columns, objects, manifest, table, ids=self.with_ids)
        )

    def __len__(self) -> int:
        return len(self.doc_ids)

    def __getitem__(self, number: int) -> CachedDocument:
        """One document. Raises IndexError, and what reading its shard raises."""
        number = operator.index(number)
        if not -len(self) <= number < len(self):
            raise IndexError(f"document {number} of a cache of {len(self)}")
        number %= len(self)
        shard = int(np.searchsorted(self.table.first_document, number, side="right")) - 1
        return self.columns(shard).document(number - int(self.table.first_document[shard]))

    def __iter__(self) -> Iterator[CachedDocument]:
        for shard in range(len(self.documents_per_shard)):
            yield from self.shard(shard)

    def __repr__(self) -> str:
        return f"<Cache {self.path}: {len(self)} documents, {self.manifest.counts['rows']} rows, k {self.manifest.k}>"

    def __reduce__(self) -> tuple:
        return open_cache, (self.path, self.with_ids)

    def shard(self, shard: int) -> list[CachedDocument]:
        """All documents of one shard."""
        columns = self.columns(shard)
        return [columns.document(number) for number in range(len(columns.documents))]

    def columns(self, shard: int) -> Columns:
        """One shard as it is stored, verified; do not write into it. Raises the kinds of CorruptCacheError."""
        if not 0 <= shard < len(self.documents_per_shard):
            raise IndexError(f"shard {shard} of a cache of {len(self.documents_per_shard)}")
        return self._columns(shard)

    @cached_property
    def vocabulary(self) -> "Vocabulary | None":
        """The teacher's words and special roles; None where no ids are kept. Raises CorruptCacheError's kinds."""
        if self.manifest.vocabulary is None:
            return None
        data = self._objects.fetch(self.manifest.vocabulary)
        try:
            return vocabulary_table.vocabulary_from_bytes(data, self.manifest.vocab_size)
        except ValueError as error:
            raise MalformedObjectError(f"{self.manifest.vocabulary.name}: {error}; {_WRITTEN_WRONGLY}") from None


def read_columns(objects: Objects, manifest: Manifest, table: ShardTable, shard: int, *, ids: bool) -> Columns:
    """A shard's columns: every object verified before it is decoded, every rule checked after.

    Without `ids` the ids' objects are not opened. Raises the kinds of CorruptCacheError.
    """
    stem, store, shape, size = stem_of(shard), shard_store(manifest.store), manifest.row_shape, table.size_of(shard)
    problem = size_problem(size, shape)
    if problem:
        raise MalformedObjectError(f"{shard_table.NAME}: shard {shard}: {problem}; {_WRITTEN_WRONGLY}")
    wanted = [
        stored
        for stored in table.objects[shard]
        if stored.name != record_name(shard) and (ids or not store.holds_ids(stored.name, stem))
    ]
    contents = objects.fetch_all(wanted)
    try:
        columns = store.decode(contents, stem, shape, size)
        problem = problem_of(columns, shape)
    except Exception as error:  # other projects' decoders raise anything on bytes that verify and are still wrong
        problem = f"{type(error).__name__}: {error}"
    else:
        members = table.documents_of(shard)
        if problem is None and (
            columns.doc_ids != table.doc_ids[members]
            or not np.array_equal(np.diff(columns.row_offsets), table.rows[members])
            or not np.array_equal(columns.text_bytes, table.text_bytes[members])
            or (ids and manifest.k_ids > 0) != (columns.token_ids is not None)
        ):
            problem = f"its documents are not those that {shard_table.NAME} lists"
    if problem:
        raise MalformedObjectError(f"{stem}: {problem}; {_WRITTEN_WRONGLY}")
    return columns

"""A cache's documents as a map-style dataset: training and held-out documents apart, numbered shard after shard."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from threading import Lock

import numpy as np
from torch.utils.data import Dataset

from distill.exclusions import Exclusions
from distill.quarantine import Quarantine
from distill.sampler import MicroBatch
from storage_specs.columns import Columns
from storage_specs.document import CachedDocument
from storage_specs.errors import CorruptCacheError
from storage_specs.reader import Cache, open_cache


class CachedDocuments(Dataset[CachedDocument]):
    """The documents of a cache that may be trained on, or with `held_out` those that never are.

    Documents without a single teacher row are left out of both. Items are decoded and verified when asked for;
    asked for a `MicroBatch`, the dataset reads the shards that it names as open at the same time, and keeps these
    decoded and no others, so that an epoch decodes each once. What cannot be read raises where a document of it is
    asked for. `sample` and `readable` read beside that, a shard at a time. `cache` is an open cache, or its folder or
    URL, of which ids are read only with `ids`; `documents` takes only the first so many, `excluded` leaves those of a
    list out. documents_per_shard: (shards,)
    int64. quarantine: where broken shards go, whose documents are then missing from micro-batches; None = they
    raise. Raises what `open_cache` raises.
    """

    def __init__(
        self,
        cache: Cache | str | Path,
        held_out: bool = False,
        ids: bool = False,
        documents: int | None = None,
        excluded: Exclusions | None = None,
    ) -> None:
        self.cache = cache if isinstance(cache, Cache) else open_cache(cache, ids=ids)
        self.excluded = excluded
        # A byte for each document and a number for each shard: 10^10 rows are planned in a few megabytes.
        self._wanted = (self.cache.rows_D > 0) & (self.cache.held_out_D == held_out)
        if excluded is not None:
            self._wanted &= ~excluded.mask_D
        if documents is not None:
            self._wanted[np.flatnonzero(self._wanted)[documents:]] = False
        self._first = np.concatenate([[0], np.cumsum(self.cache.documents_per_shard, dtype=np.int64)])
        self.documents_per_shard = np.array(
            [np.count_nonzero(self._wanted[a:b]) for a, b in zip(self._first[:-1], self._first[1:], strict=True)],
            dtype=np.int64,
        )
        self._offsets = np.concatenate([[0], np.cumsum(self.documents_per_shard)])
        self.quarantine: Quarantine | None = None
        self._open: dict[int, Future[Columns]] = {}
        self._lock = Lock()  # batches are prepared in a thread of their own

    def __len__(self) -> int:
        return int(self._offsets[-1])

    @property
    def identity(self) -> dict[str, str | None]:
        """What of the data makes a run itself: `cache_id`, and `exclude_documents` (which ones) or None."""
        excluded = None if self.excluded is None else self.excluded.identity
        return {"cache_id": self.cache.manifest.cache_id, "exclude_documents": excluded}

    def __getitem__(self, index: int) -> CachedDocument:
        shard, number = self.place_of(index)
        return self.cache.streamed(int(self._first[shard]) + number)

    def __getitems__(self, indices: Sequence[int]) -> list[CachedDocument]:
        """The documents of a batch."""
        if not isinstance(indices, MicroBatch):
            return [self[index] for index in indices]
        with self._lock:
            self._read_open_shards(indices)
            places = [self.place_of(index) for index in indices]
            needed = dict.fromkeys(shard for shard, _ in places)
            found = {shard: self._columns(shard, indices.epoch) for shard in needed}
            return [columns.document(number) for shard, number in places if (columns := found[shard]) is not None]

    def sample(self, count: int, skip_broken: bool = False) -> list[CachedDocument]:
        """The first documents; skip_broken: without those of shards that do not verify, which raise otherwise."""

        def broken(shard: int, error: CorruptCacheError) -> None:
            if not skip_broken:
                raise error

        return self._beside_an_epoch(range(min(count, len(self))), broken)

    def readable(self, indices: Iterable[int]) -> list[CachedDocument]:
        """The documents of ascending indices, less those of broken shards where there is a quarantine, which is told
        (without one they raise): what evaluations are measured on."""
        return self._beside_an_epoch(indices, lambda shard, error: self._lose(shard, 0, error))

    def _beside_an_epoch(
        self, indices: Iterable[int], broken: Callable[[int, CorruptCacheError], None]
    ) -> list[CachedDocument]:
        """Decodes one shard at a time and keeps none: an epoch's window is what fills the memory."""
        found: list[CachedDocument] = []
        for shard, places in groupby(map(self.place_of, indices), lambda place: place[0]):
            if self._is_quarantined(shard, 0):
                continue
            try:
                columns = self.cache.read_columns(shard)
            except CorruptCacheError as error:
                broken(shard, error)
            else:
                found += [columns.document(number) for _, number in places]
                del columns  # before the next one is decoded
        return found

    def place_of(self, index: int) -> tuple[int, int]:
        """(shard, number of the document in it). Raises IndexError."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        index %= len(self)
        shard = int(np.searchsorted(self._offsets, index, side="right")) - 1
        members = np.flatnonzero(self._wanted[self._first[shard] : self._first[shard + 1]])
        return shard, int(members[index - self._offsets[shard]])

    def _read_open_shards(self, batch: MicroBatch) -> None:
        """Let go of shards that are open no longer, and read those that are new all at once: an epoch opens with a
        whole window of them, and a remote store's answers are long in coming. What failed then for another reason than
        its bytes is read again when it is needed: the store may be back."""
        needed = {self.place_of(index)[0] for index in batch}
        wanted = [shard for shard in batch.open_shards if not self._is_quarantined(shard, batch.epoch)]
        kept = (shard for shard in wanted if shard in self._open)
        self._open = {shard: self._open[shard] for shard in kept if not (shard in needed and self._is_unread(shard))}
        new = [shard for shard in wanted if shard not in self._open]
        if new:
            with ThreadPoolExecutor(len(new), thread_name_prefix="shard-reader") as threads:  # at most M + 1
                self._open |= {shard: threads.submit(self.cache.read_columns, shard) for shard in new}

    def _is_unread(self, shard: int) -> bool:
        error = self._open[shard].exception()
        return error is not None and not isinstance(error, CorruptCacheError)

    def _columns(self, shard: int, epoch: int) -> Columns | None:
        """An open shard, or None where it is quarantined, from now on maybe. Raises what reading it did, once."""
        if shard not in self._open:
            return None
        try:
            return self._open[shard].result()
        except Exception as error:
            del self._open[shard]
            self._lose(shard, epoch, error)
            return None

    def _lose(self, shard: int, epoch: int, error: Exception) -> None:
        """Put a broken shard into quarantine; raises the error where there is none, or where it says something else."""
        if self.quarantine is None or not isinstance(error, CorruptCacheError):
            raise error
        first = self._first[shard]
        lost = first + np.flatnonzero(self._wanted[first : self._first[shard + 1]])
        documents = [(self.cache.doc_ids[number], self.cache.rows_D[number]) for number in lost.tolist()]
        self.quarantine.add(shard, epoch, error, documents)

    def _is_quarantined(self, shard: int, epoch: int) -> bool:
        return self.quarantine is not None and self.quarantine.covers(shard, epoch)

    @property
    def text_bytes(self) -> np.ndarray:
        """(documents,) int64: UTF-8 bytes of each document's text, known before a shard is read."""
        return self.cache.text_bytes_D[self._wanted]

"""Which documents each step learns from: a pure function of (seed, epoch, documents per shard, global batch size).

Shards are permuted, and a window of M shards slides over them, one shard further at a time: each document is served at
a random time while its shard is in the window. So at most M shards are open, one more while documents left over from
the last window wait for the next batch, and no shard comes back. The world size only slices each global batch: global
batch g holds the same documents on 1, 2 or 8 ranks, in one micro-batch or in many. The last incomplete global batch of
an epoch is dropped, or completed with empty places that weigh nothing; no document is repeated.

Nothing is kept per document or row: an epoch's plan is a stream, and its memory a few shards' numbers.

Legend: G documents of a global batch, D documents of a stretch of the epoch.
"""

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Literal

import numpy as np
from torch.utils.data import Sampler

from storage_specs.errors import ConfigError

SHARDS_MIXED = 3
EMPTY = -1  # a place of the last global batch without a document
Order = Literal["random", "group_by_length"]


class MicroBatch(list[int]):
    """Dataset indices of one micro-batch of one rank. open_shards: what this or a later one of the epoch may need."""

    open_shards: tuple[int, ...] = ()
    epoch: int = 0


class EpochBatches(Sampler[MicroBatch]):
    """A batch sampler: the micro-batches of one rank, as lists of dataset indices; shard after shard numbers them.

    documents_per_shard: the dataset's documents in each shard. A global batch is `micro_batches` (of gradient
    accumulation) x `ranks` x `documents` (per micro-batch and rank). drop_last: drop the last incomplete global batch,
    instead of completing it with nothing. lengths: (documents,) of the dataset in any unit, or None; with them each
    stretch of the epoch between two shards is sorted into batches of like lengths, whose order is random.
    Iterating gives the epoch of `set_epoch`; `of_steps` runs through epochs. Raises ConfigError where there is not one
    batch.
    """

    def __init__(
        self,
        documents_per_shard: Sequence[int] | np.ndarray,
        *,
        documents: int,
        micro_batches: int = 1,
        ranks: int = 1,
        rank: int = 0,
        seed: int = 0,
        shards_mixed: int = SHARDS_MIXED,
        drop_last: bool = False,
        lengths: np.ndarray | None = None,
    ) -> None:
        self.counts = np.asarray(documents_per_shard, dtype=np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.counts)])
        self.shape = (micro_batches, ranks, documents)
        self.rank = rank
        self.seed = seed
        self.shards_mixed = shards_mixed
        self.drop_last = drop_last
        self.lengths = lengths
        self.epoch = 0
        if not len(self):
            raise ConfigError(
                f"{self.offsets[-1]} documents do not fill one global batch of {self.global_size}: lower "
                "--per_device_train_batch_size or --gradient_accumulation_steps, leave --dataloader_drop_last out, or "
                "cache more documents"
            )

    @property
    def global_size(self) -> int:
        """Documents per optimisation step."""
        return int(np.prod(self.shape))

    @property
    def steps(self) -> int:
        """Optimisation steps per epoch."""
        whole, left_over = divmod(int(self.offsets[-1]), self.global_size)
        return whole + (left_over > 0 and not self.drop_last)

    def __len__(self) -> int:
        return self.steps * self.shape[0]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[MicroBatch]:
        return self._micro_batches(self.epoch)

    def of_steps(self, first: int, stop: int) -> Iterator[MicroBatch]:
        """The micro-batches of the steps first..stop - 1 of a run, epoch after epoch: where a run stands is its step
        number, so a resumed one goes on exactly."""
        wanted = max(0, stop - first) * self.shape[0]
        for epoch in count(first // self.steps):
            skipped = first % self.steps * self.shape[0] if epoch == first // self.steps else 0
            for micro_batch in islice(self._micro_batches(epoch), skipped, skipped + wanted):
                wanted -= 1
                yield micro_batch
            if not wanted:
                return

    def _micro_batches(self, epoch: int) -> Iterator[MicroBatch]:
        for batch_G, open_shards in self.global_batches(epoch):
            for places in batch_G.reshape(self.shape)[:, self.rank]:
                micro_batch = MicroBatch(places[places != EMPTY].tolist())
                micro_batch.open_shards, micro_batch.epoch = open_shards, epoch
                yield micro_batch

    def global_batches(self, epoch: int = 0) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
        """(G,) int64 dataset indices of every step of an epoch, the same on every rank, and the shards open then."""
        size = self.global_size
        waiting_D = np.zeros(0, dtype=np.int64)
        for served_D, shards, random in self._stretches(epoch):
            waiting_D = np.concatenate([waiting_D, served_D])
            whole = len(waiting_D) // size * size
            batches, waiting_D = waiting_D[:whole], waiting_D[whole:]
            if self.lengths is not None:
                batches = batches[np.argsort(self.lengths[batches], kind="stable")]
                batches = batches.reshape(-1, size)[_permutation(random, whole // size)]
            open_shards = self._shards_of(np.concatenate([batches.reshape(-1), waiting_D]), shards)
            for batch_G in batches.reshape(-1, size):
                yield batch_G, open_shards
        if len(waiting_D) and not self.drop_last:
            batch_G = np.full(size, EMPTY, dtype=np.int64)
            batch_G[np.arange(len(waiting_D)) * size // len(waiting_D)] = waiting_D
            yield batch_G, self._shards_of(waiting_D, ())

    def _stretches(self, epoch: int) -> Iterator[tuple[np.ndarray, tuple[int, ...], np.random.Philox]]:
        """For every position of the window: the documents served there, in order, and the shards in it."""
        random = np.random.Philox(key=[self.seed % 2**64, epoch])
        shards = _permutation(random, len(self.counts))
        width = min(self.shards_mixed, len(shards))
        positions = len(shards) - width + 1
        pending_D, times_D = np.zeros(0, dtype=np.int64), np.zeros(0)
        entered = 0
        for position in range(positions):
            while entered < position + width:
                shard = int(shards[entered])
                first, last = max(0, entered - width + 1), min(entered, positions - 1)
                size = int(self.counts[shard])
                pending_D = np.concatenate([pending_D, np.arange(self.offsets[shard], self.offsets[shard] + size)])
                times = first + (last + 1 - first) * _uniform(random, size)
                times_D = np.concatenate([times_D, np.minimum(times, np.nextafter(last + 1, 0))])  # rounded up: no
                entered += 1
            order_D = np.argsort(times_D, kind="stable")
            pending_D, times_D = pending_D[order_D], times_D[order_D]
            served = int(np.searchsorted(times_D, position + 1))
            yield pending_D[:served], tuple(shards[position : position + width].tolist()), random
            pending_D, times_D = pending_D[served:], times_D[served:]

    def _shards_of(self, documents_D: np.ndarray, more: tuple[int, ...]) -> tuple[int, ...]:
        found = np.unique(np.searchsorted(self.offsets, documents_D, side="right") - 1)
        return tuple(sorted({*found.tolist(), *more}))


def _permutation(random: np.random.Philox, count: int) -> np.ndarray:
    """A permutation from the generator's raw bits, which numpy keeps stable across versions (not so its shuffles)."""
    return np.argsort(random.random_raw(count), kind="stable")


def _uniform(random: np.random.Philox, count: int) -> np.ndarray:
    """(count,) float64 in [0, 1), from raw bits for the same reason."""
    return (random.random_raw(count) >> np.uint64(11)) * 2.0**-53

"""Which documents each step learns from: a pure function of (seed, epoch, documents per shard, global batch size).

Shards are permuted, then documents within a window of M shards, so that a process decodes a shard once per epoch and
holds few at a time. The world size only slices each global batch: global batch g holds the same documents on 1, 2 or 8
ranks, in one micro-batch or in many. The last incomplete global batch of an epoch is dropped, never filled up.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler
from transformers import TrainerCallback

from storage_specs.errors import ConfigError

# One less than the decoded shards that an open cache keeps: documents left over from the shards before may stay.
SHARDS_MIXED = 3


class EpochBatches(Sampler[list[int]]):
    """A batch sampler: the micro-batches of one rank, as lists of dataset indices; shard after shard numbers them.

    documents_per_shard: the dataset's documents in each shard. A global batch is `micro_batches` (of gradient
    accumulation) x `ranks` x `documents` (per micro-batch and rank). Call `set_epoch` before iterating.
    Raises ConfigError where the documents do not fill one global batch.
    """

    def __init__(
        self,
        documents_per_shard: Sequence[int],
        *,
        documents: int,
        micro_batches: int = 1,
        ranks: int = 1,
        rank: int = 0,
        seed: int = 0,
        shards_mixed: int = SHARDS_MIXED,
    ) -> None:
        self.counts = np.asarray(documents_per_shard, dtype=np.int64)
        self.shape = (micro_batches, ranks, documents)
        self.rank = rank
        self.seed = seed
        self.shards_mixed = shards_mixed
        self.epoch = 0
        if not len(self):
            raise ConfigError(
                f"{self.counts.sum()} documents do not fill one global batch of {self.global_size}: lower "
                "--per_device_train_batch_size or --gradient_accumulation_steps, or cache more documents"
            )

    @property
    def global_size(self) -> int:
        """Documents per optimisation step."""
        return int(np.prod(self.shape))

    @property
    def steps(self) -> int:
        """Optimisation steps per epoch."""
        return int(self.counts.sum()) // self.global_size

    def __len__(self) -> int:
        return self.steps * self.shape[0]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        for batch_G in self.global_batches():
            for micro_batch in batch_G.reshape(self.shape)[:, self.rank]:
                yield micro_batch.tolist()

    def global_batches(self) -> Iterator[np.ndarray]:
        """(global_size,) int64 dataset indices of every step of the epoch, the same on every rank."""
        random = np.random.Philox(key=[self.seed % 2**64, self.epoch])
        offsets = np.concatenate([[0], np.cumsum(self.counts)])
        shards = _permutation(random, len(self.counts))
        left_over = np.zeros(0, dtype=np.int64)
        for first in range(0, len(shards), self.shards_mixed):
            mixed = [
                np.arange(offsets[shard], offsets[shard + 1]) for shard in shards[first : first + self.shards_mixed]
            ]
            documents = np.concatenate(mixed)
            documents = np.concatenate([left_over, documents[_permutation(random, len(documents))]])
            whole = len(documents) // self.global_size * self.global_size
            yield from documents[:whole].reshape(-1, self.global_size)
            left_over = documents[whole:]


def _permutation(random: np.random.Philox, count: int) -> np.ndarray:
    """A permutation from the generator's raw bits, which numpy keeps stable across versions (not so its shuffles)."""
    return np.argsort(random.random_raw(count), kind="stable")


class SetEpoch(TrainerCallback):
    """Tells the sampler its epoch from the step number, which is exact after resuming, mid-epoch or between epochs."""

    def __init__(self, batches: EpochBatches) -> None:
        self.batches = batches

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.batches.set_epoch(state.global_step // self.batches.steps)

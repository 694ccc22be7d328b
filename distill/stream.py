"""The batches of a run from any of its steps on, prepared ahead across epochs: a run stands at its step number."""

from collections.abc import Callable, Sequence

import torch

from distill.collator import Batch
from distill.dataset import CachedDocuments
from distill.prefetch import Prefetched
from distill.sampler import EpochBatches
from storage_specs.document import CachedDocument


class Stream:
    """Micro-batches of one rank. collate: called in several threads at once; pinned: into pinned memory, from which a
    GPU takes them without waiting. `close` ends the threads."""

    def __init__(
        self,
        documents: CachedDocuments,
        batches: EpochBatches,
        collate: Callable[[Sequence[CachedDocument]], Batch],
        pinned: bool = False,
        threads: int = 1,
    ) -> None:
        self.documents, self.batches, self.collate = documents, batches, collate
        self.pinned, self.threads = pinned, threads
        self._prefetched: Prefetched[list[CachedDocument], Batch] | None = None
        self._next_step = 0

    def at(self, step: int, stop: int) -> Prefetched[list[CachedDocument], Batch]:
        """From which the micro-batches of `step` are to be taken, all of them; they go on until step `stop`."""
        prefetched = self._from(step, stop)
        self._next_step = step + 1
        return prefetched

    def peek(self, step: int, stop: int, steps: int) -> list[list[Batch]]:
        """The micro-batches of so many steps from `step` on, fewer before `stop`; `at` gives them again. Raises what
        preparing them raises, and so does `at` in its turn."""
        micro_batches = self.batches.shape[0]
        found = self._from(step, stop).peek(steps * micro_batches)
        return [found[first : first + micro_batches] for first in range(0, len(found), micro_batches)]

    def close(self) -> None:
        """End the threads, and forget what they prepared."""
        if self._prefetched is not None:
            self._prefetched.close()
            self._prefetched = None

    def _from(self, step: int, stop: int) -> Prefetched[list[CachedDocument], Batch]:
        if self._prefetched is None or self._next_step != step:
            self.close()
            documents = map(self.documents.__getitems__, self.batches.of_steps(step, stop))
            self._prefetched, self._next_step = Prefetched(documents, self._batch, threads=self.threads), step
        return self._prefetched

    def _batch(self, documents: Sequence[CachedDocument]) -> Batch:
        batch = self.collate(documents)
        if not self.pinned:
            return batch
        return {name: value.pin_memory() if torch.is_tensor(value) else value for name, value in batch.items()}

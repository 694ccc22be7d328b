"""A run whose documents cannot be had: what was learned is kept, and the error says how to go on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from storage_specs.errors import CorruptCacheError, StoreAccessError, StoreUnavailableError, TeachOnceError

if TYPE_CHECKING:
    from distill.trainer import CachedDistillationTrainer

__all__ = ["held_out_at_hand", "stop_without_documents"]


def stop_without_documents(trainer: "CachedDistillationTrainer", failure: TeachOnceError | None) -> NoReturn:
    """Save the last whole step, then raise; failure: this rank's, or None where it was another's. All ranks call."""
    trainer.save_last_step()
    after = f"training stopped after step {trainer.state.global_step}, from which the same command resumes"
    if failure is None:
        raise CorruptCacheError(f"another process could not read its documents (its error says why); {after}")
    if isinstance(failure, CorruptCacheError):
        after += "; repair the cache, or leave broken shards out with --on_corrupt quarantine"
    raise type(failure)(f"{failure}; {after}") from failure


@contextmanager
def held_out_at_hand(trainer: "CachedDistillationTrainer") -> Iterator[None]:
    """Stops a run as above where held-out documents are read inside and cannot be. Of several processes the others are
    in the middle of their shares and cannot save with this one: there the last checkpoint counts."""
    try:
        yield
    except (CorruptCacheError, StoreUnavailableError, StoreAccessError) as failure:
        if not trainer.is_in_train or trainer.accelerator.num_processes > 1:
            raise
        stop_without_documents(trainer, failure)

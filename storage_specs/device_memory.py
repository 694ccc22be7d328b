"""Where a model runs out of memory: torch's, vLLM's and Python's errors, told apart without importing either."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from storage_specs.errors import DeviceMemoryError, TeachOnceError

# What torch, CUDA's libraries and vLLM say; the last three are vLLM's, which reckons before it allocates.
SIGNS = re.compile(
    "out of memory|ALLOC_FAILED|not enough memory|can't allocate memory|No available memory for the cache|"
    "larger than the available KV|Free memory on device",
    re.IGNORECASE,
)
MOST_SAID = 200  # characters: torch goes on about its allocator


def memory_refusal(error: BaseException) -> str | None:
    """What an error, or one that it came from, says of too little memory; None where that is not what happened."""
    cause: BaseException | None = error
    while cause is not None:
        said = " ".join(str(cause).split())
        sign = SIGNS.search(said)
        if sign is not None or isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            begin = 0 if sign is None or sign.end() <= MOST_SAID else sign.start()
            cut = said[begin : begin + MOST_SAID]
            whole_sentences = cut.rpartition(". ")[0]
            return whole_sentences or cut or "no more"
        cause = cause.__cause__ or cause.__context__
    return None


@contextmanager
def memory_for(what: str, remedy: str | Callable[[], str]) -> Iterator[None]:
    """Types what is raised inside where memory is too small, and nothing else. Raises DeviceMemoryError.

    what: takes the memory, with the numbers that it depends on. remedy: what to do, or says it once that is known.
    """
    try:
        yield
    except TeachOnceError:
        raise
    except Exception as error:
        said = memory_refusal(error)
        if said is None:
            raise
        advice = remedy if isinstance(remedy, str) else remedy()
        raise DeviceMemoryError(f"{what}: out of memory ({said}); {advice}") from error

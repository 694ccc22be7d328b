"""What vLLM's exceptions mean, in one line: a GPU's memory that is too small, or anything else that stops the engine.

vLLM's engine runs in a process of its own, which prints why it ends; the exception here only says that it did.
"""

import re
from collections.abc import Mapping
from typing import Any

from storage_specs.device_memory import memory_refusal
from storage_specs.errors import DeviceMemoryError, EngineError

# Of the share that vLLM may take nothing is left for keys and values: a larger share helps there, a smaller elsewhere.
NO_CACHE = re.compile("for the cache|KV cache", re.IGNORECASE)
# "Engine core initialization failed. See root cause above." and "EngineCore encountered an issue. See stack trace ..."
ELSEWHERE = re.compile("root cause|stack trace")
SMALLER_STEPS = "lower --max-num-batched-tokens or --max-num-seqs, or share the teacher out by --tensor-parallel-size"


def failure(what: str, error: Exception, arguments: Mapping[str, Any]) -> DeviceMemoryError | EngineError:
    """What to raise for an exception of vLLM's. what: whose, and when. arguments: the engine's, by vLLM's names."""
    said, share = memory_refusal(error), arguments.get("gpu_memory_utilization")
    utilization = "--gpu-memory-utilization" + ("" if share is None else f" (now {share})")
    if said is not None:
        return DeviceMemoryError(
            f"{what}: out of memory ({said}); finished shards are kept, and the same command goes on: "
            f"{'raise' if NO_CACHE.search(said) else 'lower'} {utilization}, {SMALLER_STEPS}"
        )
    text = f"{type(error).__name__}: {error}"
    if ELSEWHERE.search(text):
        text = f"{text.rstrip('.')}; where it is memory that it lacks, lower {utilization}, {SMALLER_STEPS}"
    return EngineError(f"{what}: {text}")

"""Errors of too little memory are told from others by what torch, vLLM and Python say."""

import pickle

import pytest
import torch

from storage_specs.device_memory import MOST_SAID, memory_for, memory_refusal
from storage_specs.errors import ConfigError, DeviceMemoryError

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB of which 10.19 MiB is "
    "free. Process 1 has 79.08 GiB memory in use. Of the allocated memory 70 GiB is allocated by PyTorch. If reserved "
    "but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError(CUDA), "CUDA out of memory. Tried to allocate 20.00 MiB"),
        (torch.OutOfMemoryError("something new"), "something new"),
        (
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
            "CUDA error: out of memory CUDA kernel",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "CUBLAS_STATUS_ALLOC"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), "DefaultCPUAllocator: can't"),
        (
            ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"),
            "No available",
        ),
        (ValueError("1.0 GiB KV cache is needed, which is larger than the available KV cache memory"), "1.0 GiB KV"),
        (ValueError("Free memory on device (1/80 GiB) on startup is less than desired GPU memory"), "Free memory on"),
        (MemoryError(), "no more"),
        (RuntimeError("shapes do not match"), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_what_is_said_of_memory(error: BaseException, said: str | None) -> None:
    found = memory_refusal(error)
    assert (found is None) == (said is None)
    assert said is None or (found.startswith(said) or said in found)
    assert found is None or len(found) <= MOST_SAID
    with pytest.raises(DeviceMemoryError if said else type(error)) as raised, memory_for("a step", "rest"):
        raise error
    if said:
        assert str(raised.value) == f"a step: out of memory ({found}); rest"
        assert raised.value.__cause__ is error
        assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_causes_are_looked_through_and_typed_errors_left_alone() -> None:
    error = TypeError("while cleaning up")
    error.__context__ = RuntimeError("out of memory")
    with pytest.raises(DeviceMemoryError, match=r"\(out of memory\); fewer than 3"), memory_for("x", "fewer than 3"):
        raise error
    with pytest.raises(ConfigError, match="out of memory"), memory_for("x", "y"):
        raise ConfigError("out of memory")

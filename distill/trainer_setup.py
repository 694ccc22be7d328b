"""What Trainer raises while it is set up, as typed errors."""

from collections.abc import Iterator
from contextlib import contextmanager

from storage_specs.device_memory import memory_for
from storage_specs.errors import ConfigError, TeachOnceError


@contextmanager
def setting_up() -> Iterator[None]:
    """Types what Trainer raises for arguments that it, or a package it needs, cannot work with.

    Raises ConfigError, and DeviceMemoryError where the model is too large for its device.
    """
    try:
        with memory_for("the student's weights", "try --dtype bfloat16, or a GPU that nothing else fills"):
            yield
    except TeachOnceError:
        raise
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"training arguments: {type(error).__name__}: {error}") from error

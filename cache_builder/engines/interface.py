"""What the builder asks of an engine: rows of windows. What writes completions with it is `generating`'s."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from cache_builder.engines.base import EngineConfig, WindowScores
from storage_specs.windows import Window


class Engine(Protocol):
    """Scores windows. `describe()` works before the weights are loaded; `score` loads them, `close` lets them go."""

    config: EngineConfig

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the engine: name, version, dtype, attention backend, and what alters its values."""

    def score(self, windows: Iterable[Window]) -> Iterator[WindowScores]:
        """One WindowScores per window, in order. Uses `ids`, `logits_index` and `target_ids` only; may take windows
        ahead of what it has given. Raises EngineError, DeviceMemoryError."""

    def close(self) -> None:
        """Give back processes and memory; the next `score` loads again."""

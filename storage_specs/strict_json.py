"""JSON of unknown origin, read so that it means one thing only and costs no more than its length.

Python's own reader takes NaN, infinity, numbers that overflow to infinity, the last of equal keys, lone surrogates, and
any depth that the interpreter's stack bears.
"""

import json
from typing import Any

from storage_specs.document import canonical_json

MAX_DEPTH = 64  # of lists and objects inside one another; a chat's tool schemas take some ten


def strict_json(data: bytes | str) -> Any:
    """The value. Raises ValueError, also for UTF-8 that is none."""
    try:
        value = json.loads(data, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    if depth_exceeds(value):
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if ("\\u" if isinstance(data, str) else b"\\u") in data:
        canonical_json(value)  # raises UnicodeEncodeError, a ValueError, for half a surrogate pair
    return value


def depth_exceeds(value: Any, most: int = MAX_DEPTH) -> bool:
    """Whether lists and objects lie more than `most` deep in one another; looked at level by level, so of any depth."""
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(most):
        if not level:
            return False
        level = [
            item
            for node in level
            for item in (node.values() if isinstance(node, dict) else node)
            if isinstance(item, list | dict)
        ]
    return bool(level)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text:.50} is too large for a number")
    return value

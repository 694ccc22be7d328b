"""`cache-builder COMMAND ...`: run the teacher once and keep what it says.

    cache-builder build --teacher Qwen/Qwen3-0.6B --corpus texts.jsonl --output my-cache
    cache-builder verify my-cache
    cache-builder inspect my-cache

Nothing heavy is imported before a command runs, so that --help answers at once.
"""

from collections.abc import Sequence

from cache_builder.commands import SUMMARY
from storage_specs.command_line import dispatch, run


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code. Raises the typed errors of storage_specs.errors."""
    return dispatch("cache-builder", "cache_builder.commands", SUMMARY, arguments)


def entry() -> None:
    """The console script."""
    run(main)

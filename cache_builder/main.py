"""`cache-builder COMMAND ...`: run the teacher once and keep what it says.

    cache-builder build --teacher Qwen/Qwen3-0.6B --corpus texts.jsonl --output my-cache
    cache-builder verify my-cache
    cache-builder inspect my-cache

Nothing heavy is imported before a command runs, so that --help answers at once.
"""

import importlib
from collections.abc import Sequence

from cache_builder.commands import SUMMARY
from storage_specs.command_line import nearest, run
from storage_specs.errors import ConfigError


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code. Raises the typed errors of storage_specs.errors."""
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, SUMMARY))
        print("usage: cache-builder COMMAND ...\n")
        print("\n".join(f"  {name:{width}}  {line}" for name, line in SUMMARY.items()))
        print("\ncache-builder COMMAND --help lists the command's flags (dashes and underscores are the same)")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in SUMMARY:
        raise ConfigError(f"cache-builder: unknown command {command!r}{nearest(command, SUMMARY)}")
    return importlib.import_module(f"cache_builder.commands.{command}").run(rest)


def entry() -> None:
    """The console script."""
    run(main)

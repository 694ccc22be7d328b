"""`distill COMMAND ...`: students that learn from a cache.

    distill train --model_name_or_path HuggingFaceTB/SmolLM2-135M --cache my-cache --output_dir student
    distill align-report --cache my-cache --student HuggingFaceTB/SmolLM2-135M --html report.html
    distill evaluate --cache my-cache --model before=HuggingFaceTB/SmolLM2-135M --model after=student
    distill review --cache my-cache --model after=student --output_file sheet.html
    distill check --baseline last.json --report now.json --max-drop 1.0
    distill bench reader my-cache

Nothing heavy is imported before a command runs, so that --help answers at once.
"""

from collections.abc import Sequence

from distill.commands import SUMMARY
from storage_specs.command_line import dispatch, run


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code. Raises TeachOnceError for what the user can mend."""
    return dispatch("distill", "distill.commands", SUMMARY, arguments)


def entry() -> None:
    """The console script."""
    run(main)

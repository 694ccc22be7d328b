"""Text files that are there whole or not at all."""

from pathlib import Path

from distill.checkpoint import saving

__all__ = ["write_text"]


def write_text(path: Path, text: str) -> None:
    """Write UTF-8, newlines as they are, and the folder where it is missing. Raises StorageFullError,
    OutputFolderError."""
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}")
        scratch.write_text(text, encoding="utf8", newline="")
        scratch.replace(path)

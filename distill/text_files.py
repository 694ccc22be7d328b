"""Text files that are there whole or not at all."""

import os
from pathlib import Path

from distill.checkpoint import saving

__all__ = ["write_text"]


def write_text(path: Path, text: str) -> None:
    """Write UTF-8, newlines as they are, and the folder where it is missing. Raises StorageFullError,
    OutputFolderError."""
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}")
        with scratch.open("w", encoding="utf8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)

"""A teacher that loads in no time, for tests of the machinery: random layers under SmolLM2's tokenizer, cut short."""

import json
from pathlib import Path

from random_teacher import make_random_teacher

VOCABULARY = 2048  # words; a build with all 49,152 takes five times as long


def make_tiny_teacher(folder: Path, tokenizer_folder: Path, seed: int = 0) -> Path:
    """An ordinary Hugging Face folder in `folder`."""
    return make_random_teacher(folder, tokenizer_folder, VOCABULARY, seed=seed)


def write_corpus(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf8")
    return file


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder: {relative name: bytes}."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

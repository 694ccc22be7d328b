"""Flags that several commands share, and how their values are read."""

import argparse
import json
from pathlib import Path
from typing import Any

from storage_specs.command_line import Parser
from storage_specs.errors import ConfigError


def add_cache(parser: Parser, required: bool = True) -> None:
    """`--cache` and, for caches without text, `--corpus`."""
    add = parser.add_argument
    place = "a finished cache: folder or URL (s3://, gs://, az://, hf://)"
    add("--cache", required=required, metavar="PLACE", help=place)
    add("--corpus", metavar="PATH", help="the texts of a cache that keeps none: what it was built from")


def add_template(parser: Parser, whose: str) -> None:
    """`--chat_template` and its arguments."""
    add = parser.add_argument
    add("--chat_template", type=Path, metavar="FILE", help=f"Jinja template for chats, instead of {whose} own")
    add("--chat_template_kwargs", metavar="JSON", help="arguments of the template")


def count(text: str) -> int:
    """A whole number of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


def count_from_0(text: str) -> int:
    """A whole number, 0 included."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{value}: must not be negative")
    return value


def json_object(flag: str, value: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """A flag's JSON object, or a config file's mapping."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ConfigError(f"{flag} {value}: not JSON: {error}") from None
    if parsed is not None and not isinstance(parsed, dict):
        raise ConfigError(f"{flag} {value}: must be a JSON object, {{...}}")
    return parsed


def read_template(path: Path | None) -> str | None:
    """The text of --chat_template. Raises ConfigError."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat_template {path}: cannot be read: {error}") from None


def models_of(pairs: list[str]) -> dict[str, str]:
    """{name: model} of every `--model NAME=MODEL`. Raises ConfigError."""
    models: dict[str, str] = {}
    for pair in pairs:
        name, equals, model = pair.partition("=")
        if not (name and equals and model) or name in models:
            raise ConfigError(f"--model {pair!r}: expected NAME=MODEL, each name once")
        models[name] = model
    return models


def check_file(flag: str, path: Path | None) -> None:
    """Make the folder of a file to be written, before the work whose result it takes. Raises ConfigError."""
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{flag} {path} is a folder: name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{flag} {path}: its folder cannot be made ({error.strerror})") from None

"""Config files set what the flags would, by the flags' own types; whatever goes wrong is one line."""

import argparse
import errno
import json
from pathlib import Path
from typing import Any

import pytest

from storage_specs.command_line import Parser, parse, run
from storage_specs.errors import ConfigError


def parser() -> Parser:
    made = Parser(prog="tool", argument_default=argparse.SUPPRESS)
    made.add_argument("--count", type=int)
    made.add_argument("--rate", type=float)
    made.add_argument("--folder", type=Path)
    made.add_argument("--name", required=True)
    made.add_argument("--options", type=json.loads, metavar="JSON")
    made.add_argument("--raw_options", metavar="JSON")
    made.add_argument("--fast", action="store_true")
    made.add_argument("--model", action="append")
    made.add_argument("--parts", nargs="+", type=int)
    made.add_argument("--level", choices=["low", "high"])
    return made


def parsed(file: Path, text: str, *flags: str) -> tuple[dict[str, Any], dict[str, Any]]:
    file.write_text(text, encoding="utf8")
    namespace, extras = parse(parser(), ["--config", str(file), *flags], lambda: ["extra", "other"])
    return {name: value for name, value in vars(namespace).items() if name != "config"}, extras


YAML = """
count: 3
rate: 1
folder: out
name: 2024
options: {a: 1}
raw-options: {b: [true, null]}
fast: true
model: a=b
parts: [1, 2]
level: low
extra: false
"""
TOML = """
count = 3
rate = 1
folder = "out"
name = 2024
options = {a = 1}
raw-options = "{\\"b\\": [true, null]}"
fast = true
model = "a=b"
parts = [1, 2]
level = "low"
extra = false
"""


@pytest.mark.parametrize(("suffix", "text"), [("yaml", YAML), ("toml", TOML)])
def test_values_are_what_the_flags_would_give(tmp_path: Path, suffix: str, text: str) -> None:
    values, extras = parsed(tmp_path / f"config.{suffix}", text)
    assert values == {
        "count": 3,
        "rate": 1.0,
        "folder": Path("out"),
        "name": "2024",
        "options": {"a": 1},
        "raw_options": '{"b": [true, null]}',
        "fast": True,
        "model": ["a=b"],
        "parts": [1, 2],
        "level": "low",
    }
    assert extras == {"extra": False}


def test_null_leaves_a_flag_unset(tmp_path: Path) -> None:
    text = "name: x\ncount: null\nfast: ~\nmodel:\noptions: null\nextra: null\nunheard_of: null\n"
    assert parsed(tmp_path / "config.yaml", text) == ({"name": "x"}, {})
    with pytest.raises(ConfigError, match="required: --name"):
        parsed(tmp_path / "config.yaml", "name: null\n")


def test_flags_override_the_file_and_replace_its_lists(tmp_path: Path) -> None:
    values, _ = parsed(tmp_path / "config.yaml", YAML, "--model", "c=d", "--model=e=f", "--count", "4")
    assert (values["model"], values["count"]) == (["c=d", "e=f"], 4)
    values, _ = parsed(tmp_path / "config.yaml", "name: x\nmodel: [a=b, 7]\n")
    assert values["model"] == ["a=b", "7"]


@pytest.mark.parametrize(
    "wrong",
    [
        *("count: true", "rate: false", "folder: true", "name: no", "options: true", "model: true", "level: true"),
        *("count: 2.5", "count: many", "count: [1]", "count: {a: 1}", "folder: {a: 1}", "name: {a: 1}", "name: [x]"),
        *("fast: 1", "fast: 'yes'", "parts: 1", "parts: [1, true]", "parts: [null]", "model: [[a]]", "model: {a: b}"),
        *("options: [1]", "options: {a: 2024-01-01}", "options: '{'", "level: middle"),
    ],
)
def test_values_of_another_type_are_refused(tmp_path: Path, wrong: str) -> None:
    name = wrong.partition(":")[0]
    with pytest.raises(ConfigError, match=rf"config\.yaml: {name} (does not take|is 'middle')"):
        parsed(tmp_path / "config.yaml", ("" if name == "name" else "name: x\n") + wrong)


@pytest.mark.parametrize("wrong", ["count = true", "folder = true", "count = {a = 1}", "model = true", "fast = 1"])
def test_toml_values_of_another_type_are_refused(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(ConfigError, match="does not take"):
        parsed(tmp_path / "config.toml", f'name = "x"\n{wrong}\n')


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/far/x"), "error: /far/x: Permission denied\n"),
        (OSError("two\nlines"), "error: two lines\n"),
        (ConfigError("k is\n0"), "error: k is 0\n"),
    ],
)
def test_errors_are_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: object) -> int:
        raise error

    with pytest.raises(SystemExit) as left:
        run(main, [])
    assert left.value.code == 2
    assert capsys.readouterr().err == line

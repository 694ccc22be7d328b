"""What both commands share: config files, unknown keys, one-line errors, exit codes.

Flags may be written with dashes or underscores (`--max-model-len` = `--max_model_len`). `--config FILE` (YAML or TOML)
sets defaults by the same names; flags on the command line override it. Unknown names are errors with the nearest match.
Exit codes: 0 done, 2 bad input, 130 interrupted (the state on disk can be resumed).
"""

import argparse
import difflib
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from storage_specs.errors import ConfigError, TeachOnceError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises `ConfigError` instead of printing its usage and leaving."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")

    def names(self) -> set[str]:
        return {action.dest for action in self._actions if action.dest not in ("help", "config", "command")}


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing where no known name is near."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def normalize_flags(arguments: Sequence[str]) -> list[str]:
    """Write every `--long-flag` with dashes as `--long_flag`; values are left alone."""
    normal = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        normal.append(
            flag.replace("-", "_").replace("__", "--", 1) + equals + value if flag.startswith("--") else argument
        )
    return normal


def read_config(path: Path) -> dict[str, Any]:
    """A flat mapping from a YAML or TOML file, its keys with underscores. Raises ConfigError."""
    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise ConfigError(f"config file {path}: its name must end in .yaml, .yml or .toml")
    try:
        if path.suffix == ".toml":
            values = tomllib.loads(path.read_text(encoding="utf8"))
        else:
            import yaml

            values = yaml.safe_load(path.read_text(encoding="utf8")) or {}
    except FileNotFoundError:
        raise ConfigError(f"config file {path}: no such file") from None
    except Exception as error:
        raise ConfigError(f"config file {path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path}: expected `name: value` pairs, found {type(values).__name__}")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def parse(
    parser: Parser, arguments: Sequence[str], extra_names: Callable[[], Iterable[str]] | None = None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse flags over config file over defaults.

    `extra_names`, where given, lists names that the parser itself does not know but the command accepts (the fields of
    `TrainingArguments`, vLLM's engine arguments); it is called only when such a name occurs, so that `--help` never
    imports anything heavy. Returns (known values, extra values as strings, bools or config values).
    """
    parser.add_argument("--config", metavar="FILE", help="YAML or TOML file of the same names; flags override it")
    arguments = normalize_flags(arguments)
    first, _ = _config_only().parse_known_args(arguments)
    extras: dict[str, Any] = {}
    if first.config:
        known = parser.names()
        for name, value in read_config(Path(first.config)).items():
            if name in known:
                _set_default(parser, name, value, first.config)
            else:
                extras[name] = value
    namespace, rest = parser.parse_known_args(arguments)
    extras |= _pairs(parser, rest)
    if extras:
        allowed = set(extra_names()) if extra_names else set()
        for name in extras:
            if name not in allowed:
                raise ConfigError(f"{parser.prog}: unknown option {name!r}{nearest(name, allowed | parser.names())}")
    return namespace, extras


def _config_only() -> Parser:
    parser = Parser(add_help=False)
    parser.add_argument("--config")
    return parser


def _set_default(parser: Parser, name: str, value: Any, place: str) -> None:
    """Take a config value as the default of a flag, checked by the flag's own type and choices."""
    action = next(action for action in parser._actions if action.dest == name)
    if isinstance(value, list) != (action.nargs in ("+", "*")) and not isinstance(action, argparse._AppendAction):
        raise ConfigError(f"config file {place}: {name} does not take {value!r}")
    try:
        if action.type is not None and not isinstance(value, (bool, list)):
            value = action.type(str(value))
        elif action.type is not None and isinstance(value, list):
            value = [action.type(str(item)) for item in value]
    except (TypeError, ValueError, argparse.ArgumentTypeError):
        raise ConfigError(f"config file {place}: {name} does not take {value!r}") from None
    if action.choices and value not in action.choices:
        raise ConfigError(f"config file {place}: {name} is {value!r}, but must be one of {sorted(action.choices)}")
    action.required = False
    parser.set_defaults(**{name: value})


def _pairs(parser: Parser, rest: list[str]) -> dict[str, Any]:
    """`--name value`, `--name=value` and `--name` (true) from what the parser left over."""
    pairs: dict[str, Any] = {}
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            parser.error(f"unexpected argument {flag!r}")
        name, equals, value = flag[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else True
        pairs[name] = value
    return pairs


def run(main: Callable[[Sequence[str]], int | None], arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and leave the process: typed errors become one line on stderr and exit code 2."""
    try:
        sys.exit(main(sys.argv[1:] if arguments is None else arguments) or 0)
    except TeachOnceError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept; run the same command again to resume", file=sys.stderr)
        sys.exit(130)

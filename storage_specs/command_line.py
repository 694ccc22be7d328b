"""What both commands share: config files, unknown keys, one-line errors, exit codes.

Flags may be written with dashes or underscores (`--max-model-len` = `--max_model_len`). `--config FILE` (YAML or TOML)
sets defaults by the same names; flags on the command line override it, and `name: null` leaves a flag unset. Unknown
names are errors with the nearest match.
Exit codes: 0 done, 2 bad input, 130 interrupted (the state on disk can be resumed).
"""

import argparse
import difflib
import importlib
import json
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
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
            if value is None:
                continue
            if name in known:
                given = any(argument.partition("=")[0] == f"--{name}" for argument in arguments)
                if given and isinstance(_action(parser, name), argparse._AppendAction):
                    continue  # argparse would append the flags' values to the file's
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
    action = _action(parser, name)
    appended = isinstance(action, argparse._AppendAction)
    if appended and not isinstance(value, list):
        value = [value]
    try:
        if isinstance(value, list) != (appended or action.nargs in ("+", "*")):
            raise ValueError
        value = [_flag_value(action, item) for item in value] if isinstance(value, list) else _flag_value(action, value)
    except (TypeError, ValueError, argparse.ArgumentTypeError):
        raise ConfigError(f"config file {place}: {name} does not take {value!r}") from None
    for item in value if isinstance(value, list) else [value]:
        if action.choices and item not in action.choices:
            raise ConfigError(f"config file {place}: {name} is {item!r}, but must be one of {sorted(action.choices)}")
    action.required = False
    parser.set_defaults(**{name: value})


def _action(parser: Parser, name: str) -> argparse.Action:
    return next(action for action in parser._actions if action.dest == name)


def _flag_value(action: argparse.Action, value: Any) -> Any:
    """What the flag would make of `value` on the command line. Raises ValueError, or what the flag's type raises.

    Switches take true and false, and nothing else does; mappings are for flags whose metavar is JSON; the rest goes as
    text.
    """
    if isinstance(value, bool) or action.nargs == 0:
        if isinstance(value, bool) and action.nargs == 0:
            return value
        raise ValueError
    if isinstance(value, dict):
        if action.metavar != "JSON":
            raise ValueError
        value = json.dumps(value)
    if value is None or isinstance(value, list):
        raise ValueError
    return str(value) if action.type is None else action.type(str(value))


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


def dispatch(program: str, package: str, summary: Mapping[str, str], arguments: Sequence[str]) -> int:
    """Run `run(rest)` of the command's module in `package`; returns the exit code. summary: {command: one line}.

    Nothing of a command is imported before it runs. Raises ConfigError (no such command), and what the command raises.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, summary))
        print(f"usage: {program} COMMAND ...\n")
        print("\n".join(f"  {name:{width}}  {line}" for name, line in summary.items()))
        print(f"\n{program} COMMAND --help lists the command's flags (dashes and underscores are the same)")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in summary:
        raise ConfigError(f"{program}: unknown command {command!r}{nearest(command, summary)}")
    return importlib.import_module(f"{package}.{command.replace('-', '_')}").run(rest)


def run(main: Callable[[Sequence[str]], int | None], arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and leave the process: typed and system errors become one line on stderr, exit 2."""
    try:
        sys.exit(main(sys.argv[1:] if arguments is None else arguments) or 0)
    except TeachOnceError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # the last net: what no part of the program gave a type
        place = f"{error.filename}: " if error.filename is not None else ""
        print(f"error: {place}{' '.join((error.strerror or str(error)).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept; run the same command again to resume", file=sys.stderr)
        sys.exit(130)

"""`cache-builder COMMAND ...`: run the teacher once and keep what it says.

    cache-builder build --teacher Qwen/Qwen3-0.6B --corpus texts.jsonl --output my-cache
    cache-builder verify my-cache
    cache-builder inspect my-cache

Nothing heavy is imported before a command runs, so that --help answers at once.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from storage_specs.command_line import Parser, nearest, parse, run
from storage_specs.errors import ConfigError

SUMMARY = {
    "build": "score a corpus with a teacher and write the cache; the same command resumes",
    "finalize": "write the manifest of a cache whose shards are all there",
    "verify": "check every stored byte of a cache",
    "inspect": "say what is in a cache, and what its columns cost",
}


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
    if command == "build":
        return _build(rest)
    return {"finalize": _finalize, "verify": _verify, "inspect": _inspect}[command](rest)


def entry() -> None:
    """The console script."""
    run(main)


def build_parser() -> Parser:
    """The flags of `build`: the fields of `builder.BuildConfig`, which has the defaults and checks the values."""
    parser = Parser(
        prog="cache-builder build",
        description="Score a corpus with a teacher and write the cache. The same command resumes an interrupted build.",
        epilog="With --engine vllm every other flag is a vLLM engine argument, such as --tensor_parallel_size 2.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--teacher", required=True, metavar="MODEL", help="hub name or local Hugging Face folder")
    add(
        "--corpus",
        required=True,
        metavar="PATH",
        help=".jsonl, .json (.gz), .parquet, .txt, .md, a folder, or `datasets`",
    )
    add("--output", required=True, metavar="PLACE", help="the cache's folder, or s3://, gs://, az:// and where")
    add("--k", type=int, metavar="N", help="sorted probabilities kept per row (64)")
    add("--k_ids", type=int, metavar="N", help="ranks whose token ids are kept too (16; 0 = none)")
    add("--engine", metavar="NAME", help="transformers | vllm | auto = vllm where it and a GPU are there (auto)")
    add("--dtype", metavar="D", help="float32 | bfloat16 | float16 | auto = the model's own (auto)")
    add("--max_model_len", type=int, metavar="N", help="tokens of context per window (the model's own, at most 4096)")
    add("--window_overlap", type=int, metavar="N", help="tokens that a later window repeats (max_model_len / 8)")
    add("--revision", metavar="R", help="branch, tag or commit of a hub teacher")
    add("--tokenizer", metavar="MODEL", help="hub name or folder, where it is not the teacher's own")
    add("--bos_token", metavar="TOKEN", help="put in front of texts where the tokenizer puts nothing, to score token 1")
    add("--chat_template", metavar="FILE", help="Jinja template for chats, instead of the tokenizer's own")
    add(
        "--chat_template_kwargs",
        type=_json_object,
        metavar="JSON",
        help="arguments of the template; kept in the manifest",
    )
    add("--kind", metavar="KIND", help="text | completion | chat | auto = by each record's fields (auto)")
    add(
        "--score_roles",
        type=_roles,
        metavar="ROLES",
        help="whose turns of a chat are scored, separated by commas; tool results never are (assistant)",
    )
    add("--split", metavar="NAME", help="split of a `datasets` corpus (train)")
    add("--subset", metavar="NAME", help="configuration of a `datasets` hub name")
    add("--max_documents", type=int, metavar="N", help="take the first N documents")
    add("--min_bytes", type=int, metavar="N", help="pass over documents of fewer UTF-8 bytes")
    add("--store", metavar="NAME", help="zarr | arrow (zarr)")
    add("--documents_per_shard", type=int, metavar="N", help="documents per shard, the unit of resuming (256)")
    return parser


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {text}")
    return value


def _roles(text: str) -> tuple[str, ...]:
    return tuple(role.strip() for role in text.split(","))


def _build(arguments: Sequence[str]) -> int:
    namespace, extras = parse(build_parser(), arguments, _engine_argument_names)
    values = {name: value for name, value in vars(namespace).items() if name != "config"}
    from cache_builder.builder import BuildConfig, build
    from cache_builder.inspection import build_summary

    report = build(BuildConfig(**values, engine_arguments=extras))
    print(build_summary(report, values["output"]))
    return 0


def _engine_argument_names() -> list[str]:
    from cache_builder.engines.vllm import engine_argument_names

    return engine_argument_names()


def _cache_parser(command: str) -> Parser:
    parser = Parser(prog=f"cache-builder {command}", description=SUMMARY[command].capitalize() + ".")
    parser.add_argument("cache", metavar="CACHE", help="the cache's folder or URL (s3://, gs://, az://, hf://)")
    return parser


def _finalize(arguments: Sequence[str]) -> int:
    namespace, _ = parse(_cache_parser("finalize"), arguments)
    from storage_specs.finalization import finalize_cache

    manifest = finalize_cache(namespace.cache)
    print(f"finished: {namespace.cache}, cache_id {manifest.cache_id}")
    return 0


def _verify(arguments: Sequence[str]) -> int:
    parser = _cache_parser("verify")
    parser.add_argument("--fast", action="store_true", help="compare sizes only; read no shard")
    namespace, _ = parse(parser, arguments)
    from storage_specs.verification import verify_cache

    report = verify_cache(namespace.cache, fast=namespace.fast)
    print(report, file=sys.stdout if report.ok else sys.stderr)
    return 0 if report.ok else 2


def _inspect(arguments: Sequence[str]) -> int:
    parser = _cache_parser("inspect")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--rows", type=int, default=0, metavar="N", help="also show the first N rows of the first document"
    )
    namespace, _ = parse(parser, arguments)
    from cache_builder.inspection import describe, inspect, show_rows

    facts = inspect(namespace.cache)
    sys.stdout.write(json.dumps(facts, indent=2, ensure_ascii=False) + "\n" if namespace.json else describe(facts))
    if namespace.rows and not namespace.json:
        sys.stdout.write(show_rows(namespace.cache, namespace.rows))
    return 0

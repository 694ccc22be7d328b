"""`cache-builder build`: score a corpus with a teacher and write the cache."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from storage_specs.command_line import Parser, parse


def parser() -> Parser:
    """The flags of `build`: the fields of `builder.BuildConfig`, which has the defaults and checks the values."""
    flags = Parser(
        prog="cache-builder build",
        description="Score a corpus with a teacher and write the cache. The same command resumes an interrupted build.",
        epilog="With --engine vllm every other flag is a vLLM engine argument, such as --tensor_parallel_size 2.",
        argument_default=argparse.SUPPRESS,
    )
    add = flags.add_argument
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
    add("--profile", metavar="NAME", help="how values are stored: exact | half | compact (compact)")
    add("--self_check", type=int, metavar="N", help="first tokens compared with an independent forward (512; 0 = none)")
    add("--documents_per_shard", type=int, metavar="N", help="documents per shard, the unit of resuming (256)")
    return flags


def run(arguments: Sequence[str]) -> int:
    """Build, and say what was done."""
    namespace, extras = parse(parser(), arguments, _engine_argument_names)
    values = {name: value for name, value in vars(namespace).items() if name != "config"}
    from cache_builder.builder import BuildConfig, build
    from cache_builder.inspection import build_summary

    report = build(BuildConfig(**values, engine_arguments=extras))
    print(build_summary(report, values["output"]))
    return 0


def _engine_argument_names() -> list[str]:
    from cache_builder.engines.vllm import engine_argument_names

    return engine_argument_names()


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {text}")
    return value


def _roles(text: str) -> tuple[str, ...]:
    return tuple(role.strip() for role in text.split(","))

"""`cache-builder build`: score a corpus with a teacher and write the cache."""

import argparse
import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from cache_builder.commands import SUMMARY
from storage_specs.command_line import Parser, parse


def parser(command: str = "build", *, without: Collection[str] = (), optional: Collection[str] = ()) -> Parser:
    """The flags of `build`: the fields of `builder.BuildConfig`, which has the defaults and checks the values.

    Other commands that score documents take them, too: `without` some, and with some `optional` that a build needs.
    """
    flags = Parser(
        prog=f"cache-builder {command}",
        description=f"{SUMMARY[command].capitalize()}.",
        epilog="With --engine vllm every other flag is a vLLM engine argument, such as --tensor_parallel_size 2.",
        argument_default=argparse.SUPPRESS,
    )

    def add(flag: str, *, required: bool = False, **options: Any) -> None:
        name = flag.removeprefix("--")
        if name not in without:
            flags.add_argument(flag, required=required and name not in optional, **options)

    add("--teacher", required=True, metavar="MODEL", help="hub name or local Hugging Face folder")
    add(
        "--corpus",
        required=True,
        metavar="PATH",
        help=".jsonl, .json (.gz), .parquet, .txt, .md, a folder, or `datasets`",
    )
    add("--output", required=True, metavar="PLACE", help="the cache's folder, or s3://, gs://, az:// and where")
    add("--k", type=int, metavar="N", help="sorted probabilities kept per row (64; sketch: 16)")
    add("--k_ids", type=int, metavar="N", help="ranks whose token ids are kept too (16; 0 = none)")
    add(
        "--engine",
        metavar="NAME",
        help="transformers | vllm | server | auto = vllm if it and a GPU are there (auto)",
    )
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
    add("--profile", metavar="NAME", help="how values are stored: exact | half | compact | sketch (compact)")
    add("--tail_bins", type=int, metavar="N", help="profile sketch: masses kept of the tail's log-spaced ranks (20)")
    add("--self_check", type=int, metavar="N", help="first tokens compared with an independent forward (512; 0 = none)")
    add("--documents_per_shard", type=int, metavar="N", help="documents per shard, the unit of resuming (256)")
    add("--shard_range", type=_shard_range, metavar="A:B", help="only shards A to B - 1 of the plan, for job arrays")
    add("--data_parallel_size", type=int, metavar="N", help="replicas of the teacher, one process and GPU each (1)")
    add("--no_text", action="store_true", help="keep no texts, only their digests; students then need the corpus")
    add("--extend", metavar="CACHE", help="a finished cache to take over; only documents that it lacks are scored")
    add("--base_url", metavar="URL", help="engine server: an OpenAI-compatible endpoint, up to and with /v1")
    add("--api_key_env", metavar="NAME", help="engine server: the environment variable of its key (OPENAI_API_KEY)")
    add("--max_concurrency", type=int, metavar="N", help="engine server: requests under way at a time (16)")
    add("--timeout", type=float, metavar="SECONDS", help="engine server: patience for one answer (600)")
    add("--vocab_size", type=int, metavar="N", help="engine server: the teacher's words, where no --tokenizer is named")
    add("--launcher", metavar="NAME", help="local | ray = actors of a Ray cluster, data_parallel_size of them (local)")
    add(
        "--mode",
        metavar="MODE",
        help="score = the corpus as it is | generate = the teacher answers its prompts (score)",
    )
    add("--temperature", type=float, metavar="T", help="mode generate: sampling temperature, 0 = greedy (1)")
    add("--top_p", type=float, metavar="P", help="mode generate: draw from the fewest tokens that reach this mass (1)")
    add("--top_k", type=int, metavar="N", help="mode generate: draw from the N most probable tokens, 0 = all (0)")
    add("--n", type=int, metavar="N", help="mode generate: completions per prompt (1)")
    add("--stop", action="append", metavar="TEXT", help="mode generate: ends a completion; may be given several times")
    add("--seed", type=int, metavar="N", help="mode generate: seed of all samples (0)")
    add(
        "--max_tokens",
        type=int,
        metavar="N",
        help="mode generate: most tokens of a completion, in what max_model_len leaves (256)",
    )
    return flags


def run(arguments: Sequence[str]) -> int:
    """Build, and say what was done."""
    namespace, extras = parse(parser(), arguments, engine_argument_names)
    values = {name: value for name, value in vars(namespace).items() if name != "config"}
    from cache_builder.build_config import BuildConfig
    from cache_builder.builder import build
    from cache_builder.inspection import build_summary

    report = build(BuildConfig(**values, engine_arguments=extras))
    print(build_summary(report, values["output"]))
    return 0


def engine_argument_names() -> list[str]:
    """vLLM's, looked up only where a flag is none of ours."""
    from cache_builder.engines import vllm

    return vllm.engine_argument_names()


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, found {text} ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, found {text}")
    return value


def _roles(text: str) -> tuple[str, ...]:
    return tuple(role.strip() for role in text.split(","))


def _shard_range(text: str) -> tuple[int, int | None]:
    numbers = re.fullmatch(r"(\d*):(\d*)", text, re.ASCII)
    if numbers is None:
        raise argparse.ArgumentTypeError(f"expected A:B, two whole numbers, found {text}")
    start, stop = numbers.groups()
    return int(start or 0), int(stop) if stop else None

"""`cache-builder repair`: mend a damaged cache, or say what of it is lost."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cache_builder.commands import build
from cache_builder.commands.cache_parser import shard_bar
from storage_specs.command_line import Parser, parse

if TYPE_CHECKING:
    from cache_builder.repair import RepairReport

NOT_FOR_REPAIR = ("output", "shard_range", "extend", "launcher", "data_parallel_size")
FIRST_WORDS = 60  # characters shown of a lost document


def parser() -> Parser:
    """The flags of `build` that say what scores documents and which; the cache itself says the rest."""
    flags = build.parser("repair", without=NOT_FOR_REPAIR, optional=["teacher", "corpus"])
    flags.add_argument("cache", metavar="CACHE", help="the damaged cache's folder or URL")
    return flags


def run(arguments: Sequence[str]) -> int:
    """Repair; exit code 2 where documents are lost and no teacher was given."""
    namespace, extras = parse(parser(), arguments, build.engine_argument_names)
    flags = {name: value for name, value in vars(namespace).items() if name not in ("config", "cache")}
    if extras:
        flags["engine_arguments"] = extras
    from cache_builder.repair import repair
    from storage_specs.errors import ConfigError

    if ("teacher" in flags) != ("corpus" in flags):
        raise ConfigError("repair needs --teacher and --corpus both to score documents again, or neither")
    with shard_bar("repair") as progress:
        report = repair(namespace.cache, flags, progress)
    for name in report.restored:
        print(f"restored {name}")
    if report.manifest is not None:
        print(f"{namespace.cache}: {_outcome(report)}, cache_id {report.manifest.cache_id}")
        return 0
    for shard, documents in report.lost.items():
        for doc_id, text in documents:
            words = "text damaged, too" if text is None else repr(text[:FIRST_WORDS])
            print(f"lost: shard {shard}, {doc_id}, {words}")
    what = f"{sum(map(len, report.lost.values()))} documents of {len(report.lost)} shards" if report.lost else ""
    lost = " and ".join(filter(None, [what, "the vocabulary" if report.vocabulary_lost else ""]))
    print(
        f"error: {namespace.cache}: lost are {lost}; run `cache-builder repair {namespace.cache} --teacher MODEL "
        "--corpus PATH` with what the cache was built from",
        file=sys.stderr,
    )
    return 2


def _outcome(report: "RepairReport") -> str:
    if report.shards_scored:
        return f"{report.shards_scored} shards scored again; replaces {report.manifest.replaces[-1]}"
    return "whole again" if report.restored else "nothing to repair"

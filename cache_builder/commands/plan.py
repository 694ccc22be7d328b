"""`cache-builder plan`: what a build would read, store and cost. Takes build's flags, and writes nothing."""

import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from cache_builder.commands import build
from storage_specs.command_line import Parser, parse
from storage_specs.errors import ConfigError


def parser() -> Parser:
    """The flags of `build`, of which --output may be left out, and where the speed is from."""
    flags = build.parser("plan", optional=["output"])
    flags.add_argument(
        "--tokens_per_second", type=float, metavar="X", help="speed of one replica, as `build` printed it"
    )
    flags.add_argument(
        "--probe", type=float, nargs="?", const=30.0, metavar="SECONDS", help="measure the speed with the engine (30)"
    )
    return flags


def run(arguments: Sequence[str]) -> int:
    """Print the sheet."""
    namespace, extras = parse(parser(), arguments, build.engine_argument_names)
    values = {"output": Path()} | {name: value for name, value in vars(namespace).items() if name != "config"}
    given, seconds = values.pop("tokens_per_second", None), values.pop("probe", None)
    if given is not None and seconds is not None:
        raise ConfigError("cache-builder plan: --tokens_per_second and --probe both give the speed; leave one out")
    for name, value in (("tokens_per_second", given), ("probe", seconds)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} is {value}, but must be above 0 and finite")
    from cache_builder.build_config import BuildConfig
    from cache_builder.cost_sheet import describe, probed, workload_of
    from cache_builder.preparation import prepare

    config = BuildConfig(**values, engine_arguments=extras)
    prepared = prepare(config)
    work = workload_of(prepared, config.shards_of(prepared.plan))
    speed = None if given is None else (given, "given")
    if seconds is not None:
        with closing(prepared.engine):
            speed = probed(prepared, seconds), f"probed for about {seconds:g} s"
    sheet = describe(
        work,
        profile=prepared.recipe.settings.config["profile"],
        k=config.k,
        k_ids=config.ids_kept,
        replicas=config.data_parallel_size,
        gpus=config.gpus_per_replica,
        speed=speed,
    )
    print(sheet)
    return 0

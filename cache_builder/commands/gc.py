"""`cache-builder gc`: remove what belongs to no cache any more."""

from collections.abc import Sequence

from cache_builder.commands.cache_parser import cache_parser
from storage_specs.command_line import Parser, parse


def parser() -> Parser:
    """The flags of `gc`."""
    flags = cache_parser("gc")
    flags.add_argument("--dry_run", action="store_true", help="list it only")
    flags.add_argument(
        "--grace",
        type=float,
        metavar="SECONDS",
        help="spare what is younger, for builders on other machines; 0 where there are none (3600)",
    )
    return flags


def run(arguments: Sequence[str]) -> int:
    """Remove or list the garbage, one object a line."""
    namespace, _ = parse(parser(), arguments)
    from storage_specs.garbage import DEFAULT_GRACE, collect_garbage

    grace = DEFAULT_GRACE if namespace.grace is None else namespace.grace
    garbage = collect_garbage(namespace.cache, grace=grace, dry_run=namespace.dry_run)
    for name, size in garbage.removable:
        print(f"{'would remove' if namespace.dry_run else 'removed'} {name} ({size:,} bytes)")
    for name, size in garbage.young:
        print(f"spared {name} ({size:,} bytes): younger than {grace:g} s")
    for name, _ in garbage.foreign:
        print(f"left alone {name}: no name that a cache gives")
    size = sum(size for _, size in garbage.removable)
    did = "would be removed" if namespace.dry_run else "removed"
    print(f"{namespace.cache}: {len(garbage.removable):,} objects of {size:,} bytes {did}")
    return 0

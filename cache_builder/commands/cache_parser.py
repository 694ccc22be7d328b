"""The parser of every command that works on one cache, and the bar of those that work through its shards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cache_builder.commands import SUMMARY
from storage_specs.command_line import Parser


def cache_parser(command: str) -> Parser:
    """A parser with the cache's place; the command adds its own flags."""
    parser = Parser(prog=f"cache-builder {command}", description=SUMMARY[command].capitalize() + ".")
    parser.add_argument("cache", metavar="CACHE", help="the cache's folder or URL (s3://, gs://, az://, hf://)")
    return parser


@contextmanager
def shard_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A tqdm bar in shards, for functions that call `progress(done, all)`; quiet where stderr is no terminal."""
    from tqdm import tqdm

    with tqdm(desc=description, unit="shard", disable=None) as bar:

        def progress(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        yield progress

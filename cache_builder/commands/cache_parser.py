"""The parser of every command that works on one cache."""

from cache_builder.commands import SUMMARY
from storage_specs.command_line import Parser


def cache_parser(command: str) -> Parser:
    """A parser with the cache's folder; the command adds its own flags."""
    parser = Parser(prog=f"cache-builder {command}", description=SUMMARY[command].capitalize() + ".")
    parser.add_argument("cache", metavar="CACHE", help="the cache's folder or URL (s3://, gs://, az://, hf://)")
    return parser

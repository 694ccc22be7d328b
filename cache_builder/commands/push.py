"""`cache-builder push`: copy a finished cache to another folder or object store, or from there."""

import os
from collections.abc import Sequence

from cache_builder.commands.cache_parser import cache_parser
from storage_specs.command_line import Parser, parse


def parser() -> Parser:
    """The flags of `push`."""
    flags = cache_parser("push")
    flags.add_argument("target", metavar="TARGET", help="where to: a folder, or s3://, gs://, az:// and where")
    return flags


def run(arguments: Sequence[str]) -> int:
    """Copy what is not there yet, and say how much that was."""
    namespace, _ = parse(parser(), arguments)
    from tqdm import tqdm

    from storage_specs.copying import copy_cache

    with tqdm(unit="B", unit_scale=True, disable=None, desc=os.path.basename(namespace.target.rstrip("/"))) as bar:

        def progress(done: int, everything: int) -> None:
            bar.total = everything
            bar.update(done - bar.n)

        report = copy_cache(namespace.cache, namespace.target, progress)
    print(
        f"{namespace.target}: cache_id {report.manifest.cache_id}; wrote {report.written_objects:,} of "
        f"{report.objects:,} objects, {report.written_bytes:,} bytes"
    )
    return 0

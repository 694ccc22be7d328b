"""`distill review`: a sheet of the documents about which student and teacher disagree most, and its decisions back.

distill review --cache my-cache --model small=student --output_file sheet.html --output_file sheet.csv
distill review --cache my-cache --apply sheet.csv --output_file excluded.txt
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from distill.commands.flags import add_cache, add_template, check_file, count, json_object, read_template
from storage_specs.command_line import Parser, parse
from storage_specs.errors import ConfigError

SPLITS = ("train", "held_out", "all")
KINDS = (".csv", ".html")


def review_parser() -> Parser:
    """The flags of `review`."""
    parser = Parser(
        prog="distill review",
        description="The documents about which student and teacher disagree most, for human reviewers: a sheet with "
        "accept/reject (.csv, .html), or with --apply the list of rejected ones for `distill train "
        "--exclude_documents`.",
    )
    add = parser.add_argument
    add_cache(parser)
    add("--model", metavar="NAME=MODEL", help="the student: name in the sheet = hub name or folder")
    add("--apply", type=Path, metavar="SHEET", help="read a sheet's decisions back, instead of making one")
    add(
        "--output_file",
        required=True,
        action="append",
        type=Path,
        metavar="FILE",
        help="the sheet, .csv or .html (repeat for both); with --apply the list of rejected documents",
    )
    add("--split", default="train", choices=SPLITS, metavar="S", help="train | held_out | all (default: train)")
    add("--top", type=count, default=50, metavar="N", help="documents in the sheet (default: 50)")
    add("--max_documents", type=count, metavar="N", help="look at the first N documents of the split (default: all)")
    add("--exclude_documents", type=Path, metavar="FILE", help="leave the documents of an earlier list out")
    add("--max_length", type=count, default=1024, metavar="N", help="tokens per window (default: 1024)")
    add("--batch_size", type=count, default=8, metavar="N", help="windows per forward pass (default: 8)")
    add_template(parser, "the student's")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code. Raises ConfigError, AlignmentError, and what reading a cache raises."""
    namespace, _ = parse(review_parser(), arguments)
    for path in namespace.output_file:
        check_file("--output_file", path)
    if namespace.apply is not None:
        return _apply(namespace)
    name, equals, model = (namespace.model or "").partition("=")
    if not (name and equals and model):
        raise ConfigError(f"--model {namespace.model!r}: expected NAME=MODEL (or --apply SHEET to read decisions back)")
    kinds = [path.suffix for path in namespace.output_file]
    if not set(kinds) <= set(KINDS) or len(set(kinds)) < len(kinds):
        named = ", ".join(map(str, namespace.output_file))
        raise ConfigError(f"--output_file {named}: a sheet is one .csv, one .html, or both")
    return _make(namespace, name, model)


def _apply(namespace: argparse.Namespace) -> int:
    if namespace.model is not None or len(namespace.output_file) > 1:
        raise ConfigError("--apply reads one sheet and writes one list: leave out --model, and name one --output_file")
    from distill.review.sheet import exclusion_lines, read_sheet
    from distill.text_files import write_text
    from storage_specs.reader import open_cache

    cache = open_cache(namespace.cache, ids=False)
    lines = exclusion_lines(read_sheet(namespace.apply, cache), cache.manifest.cache_id)
    (path,) = namespace.output_file
    write_text(path, "".join(f"{line}\n" for line in lines))
    print(f"{path}: {lines[1].partition(': ')[2]}")
    return 0


def _make(namespace: argparse.Namespace, name: str, model: str) -> int:
    import torch

    from distill.exclusions import Exclusions, read_exclusions
    from distill.review.page import as_page
    from distill.review.reviewer import Reviewer
    from distill.review.sheet import as_csv, sheet_rows
    from distill.students import evaluated_digest, load_model, load_tokenizer
    from distill.text_files import write_text
    from storage_specs.device_memory import memory_for
    from storage_specs.reader import open_cache

    cache = open_cache(namespace.cache, corpus=namespace.corpus)
    listed = namespace.exclude_documents
    excluded = None if listed is None else Exclusions(cache, read_exclusions(listed), listed)
    rendering = {
        "max_length": namespace.max_length,
        "chat_template": read_template(namespace.chat_template),
        "chat_template_kwargs": json_object("--chat_template_kwargs", namespace.chat_template_kwargs),
    }
    identity = {
        **rendering,
        "cache_id": cache.manifest.cache_id,
        "student_digest": evaluated_digest(model),
        "split": namespace.split,
        "max_documents": namespace.max_documents,
        "exclude_documents": None if excluded is None else excluded.identity,
    }
    first = namespace.output_file[0]
    progress = first.with_name(f".{first.name}.progress")
    at_a_time = f"model {name}, {namespace.batch_size} windows of at most {namespace.max_length} tokens at a time"
    with memory_for(at_a_time, "what is scored is kept, and the same command goes on: try a smaller --batch_size"):
        student = load_model(model, "float32").to("cuda" if torch.cuda.is_available() else "cpu")
        documents = Reviewer(cache, student, load_tokenizer(model), batch_size=namespace.batch_size, **rendering).worst(
            progress,
            identity,
            split=namespace.split,
            top=namespace.top,
            max_documents=namespace.max_documents,
            excluded=excluded,
        )
    rows = sheet_rows(documents, name, cache.manifest.cache_id)
    title = f"{name} and {cache.manifest.teacher.get('name')}: where they disagree"
    for path in namespace.output_file:
        page = path.suffix == ".html"
        write_text(path, as_page(documents, rows, title, f"{path.stem}.csv") if page else as_csv(rows))
        print(f"{path}: {len(rows)} documents, disagreement {rows[0]['disagreement']} to {rows[-1]['disagreement']}")
    progress.unlink(missing_ok=True)
    return 0

"""`distill align-report`: what a student would learn from a cache, and where not, before anything is trained."""

import json
from collections.abc import Sequence
from pathlib import Path

from distill.commands.flags import add_cache, check_file, count, read_template
from storage_specs.command_line import Parser, parse


def align_report_parser() -> Parser:
    """The flags of `align-report`."""
    parser = Parser(
        prog="distill align-report",
        description="Put a teacher's rows and a student's tokens side by side: and a verdict.",
    )
    add = parser.add_argument
    add_cache(parser)
    add("--student", required=True, metavar="MODEL", help="hub name or folder; only its tokenizer is loaded")
    add("--html", type=Path, metavar="FILE", help="write the report as one HTML file")
    add("--json", action="store_true", help="print one JSON object")
    add("--max_length", type=count, default=1024, metavar="N", help="tokens per window in training (default: 1024)")
    add("--max_documents", type=count, metavar="N", help="take the first N documents (default: all)")
    add("--chat_template", type=Path, metavar="FILE", help="Jinja template for chats, instead of the tokenizer's own")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code. Raises ConfigError, and what reading a cache raises."""
    namespace, _ = parse(align_report_parser(), arguments)
    check_file("--html", namespace.html)
    template = read_template(namespace.chat_template)
    from distill.alignment_report import alignment_report
    from distill.dataset import CachedDocuments
    from distill.report_format import as_html, as_text
    from distill.students import load_tokenizer
    from distill.text_files import write_text
    from storage_specs.reader import open_cache

    cache = open_cache(namespace.cache, corpus=namespace.corpus)
    documents = CachedDocuments(cache, documents=namespace.max_documents)
    facts = alignment_report(
        documents,
        load_tokenizer(namespace.student),
        teacher_digest=documents.cache.manifest.tokenizer.get("digest"),
        max_length=namespace.max_length,
        chat_template=template,
    )
    print(json.dumps(facts, indent=2, ensure_ascii=False) if namespace.json else as_text(facts))
    if namespace.html is not None:
        title = f"{documents.cache.manifest.teacher.get('name')} to {namespace.student}"
        write_text(namespace.html, as_html(facts, title))
    return 0

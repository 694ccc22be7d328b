"""The facts of `distill.alignment_report` for a terminal and as one HTML file without any outside reference."""

from html import escape
from typing import Any

GROUPS_SHOWN = 12

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.5em 0 1.5em}td,th{padding:.15em .7em;text-align:left;vertical-align:top}
th{border-bottom:1px solid #999}.bar{background:#48c;height:.8em;display:inline-block}
code{background:#eef;padding:0 .15em;margin-right:.2em;white-space:pre-wrap}.verdict{font-size:1.2em}"""

Table = tuple[str, list[str], list[list[str]]]


def tables(facts: dict[str, Any]) -> list[Table]:
    """(title, column names, rows) of everything but the strings and documents."""
    return [
        (
            "Compared",
            ["mode", "pairs", "teacher rows", "student positions"],
            [
                [mode, f"{row['pairs']:,}", f"{row['teacher_rows']:.1%}", f"{row['student_positions']:.1%}"]
                for mode, row in facts["modes"].items()
            ],
        ),
        (
            "Groups (student tokens : teacher tokens over the same bytes)",
            ["size", "groups", "share of scored bytes"],
            [
                [f"{row['student']}:{row['teacher']}", f"{row['groups']:,}", f"{row['bytes']:.1%}"]
                for row in facts["groups"][:GROUPS_SHOWN]
            ],
        ),
        (
            "The teacher along the text",
            ["tenth", "top-k mass", "entropy, nats (at least)"],
            [
                [str(n + 1), f"{row['top_k_mass']:.3f}", f"{row['entropy_nats_at_least']:.2f}"]
                for n, row in enumerate(facts["along_the_text"])
            ],
        ),
        (
            "Rank of the real next token",
            ["rank", "share of rows"],
            [[name, f"{share:.1%}"] for name, share in facts["gold_rank"].items()],
        ),
    ]


def summary(facts: dict[str, Any]) -> list[str]:
    """The lines in front of the tables."""
    windows = facts["windows"]
    return [
        f"{facts['documents']:,} documents, {facts['scored_bytes']:,} scored bytes, {facts['teacher_rows']:,} teacher "
        f"rows, {facts['student_positions']:,} student positions",
        f"{facts['one_to_one_bytes']:.1%} of the bytes are in one-to-one groups, {facts['grouped_bytes']:.1%} in "
        f"groups of any size, {facts['bytes_without_teacher_row']:.1%} have no teacher row",
        f"{facts['positional_at_same_byte']:.1%} of positional pairs stand at the same byte",
        f"numerals: {facts['numerals']:.1%} of the teacher's rows (--skip-numerals leaves them out)",
        f"the teacher's cached values hold {facts['top_k_mass']:.1%} of its probability",
        f"windows of {windows['max_length']} tokens: {windows['windows']:,}; {windows['documents_of_several']:,} "
        f"documents need several (nothing is lost), {windows['groups_cut']:,} groups of merge are cut by their edges",
    ]


def as_text(facts: dict[str, Any]) -> str:
    """For a terminal."""
    lines = [*summary(facts), ""]
    for title, names, rows in tables(facts):
        widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
        lines.append(title)
        for row in (names, *rows):
            lines.append("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
        lines.append("")
    lines.append("Documents that align worst (share of bytes in one-to-one groups)")
    for row in facts["worst_documents"]:
        lines.append(f"  {row['one_to_one_bytes']:6.1%}  {row['doc_id'][:12]}  {row['text'][:60]!r}")
    lines += ["", "Strings that align worst (tokens that boundary does not compare; teacher | student)"]
    for row in facts["worst_strings"]:
        sides = " | ".join(" ".join(map(repr, row[side])) for side in ("teacher", "student"))
        lines.append(f"  {row['uncompared_tokens']:6,}  {sides}")
    return "\n".join([*lines, "", f"verdict: {facts['verdict']}"])


def as_html(facts: dict[str, Any], title: str) -> str:
    """One whole page."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{escape(title)}</h1><p class=verdict><b>Verdict:</b> {escape(facts['verdict'])}</p>",
        *(f"<p>{escape(line)}</p>" for line in summary(facts)),
    ]
    for name, columns, rows in tables(facts):
        parts.append(html_table(name, columns, [[_with_bar(cell) for cell in row] for row in rows]))
    documents = [
        [f"{row['one_to_one_bytes']:.1%}", escape(row["doc_id"][:12]), escape(row["text"])]
        for row in facts["worst_documents"]
    ]
    parts.append(html_table("Documents that align worst", ["one-to-one bytes", "document", "begins"], documents))
    strings = [
        [f"{row['uncompared_tokens']:,}", *("".join(_code(t) for t in row[side]) for side in ("teacher", "student"))]
        for row in facts["worst_strings"]
    ]
    parts.append(html_table("Strings that align worst", ["tokens not compared", "teacher", "student"], strings))
    return "\n".join(parts) + "\n"


def html_table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    """A headed table; cells are HTML, the rest is escaped."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<h2>{escape(title)}</h2><table><tr>{head}</tr>{body}</table>"


def _code(token: str) -> str:
    return f"<code>{escape(token)}</code>"


def _with_bar(cell: str) -> str:
    if not cell.endswith("%"):
        return escape(cell)
    return f"<span class=bar style='width:{float(cell[:-1]) / 12:.2f}em'></span> {escape(cell)}"

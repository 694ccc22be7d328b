"""The sheet of a review as CSV: written for a spreadsheet, filled in by a human, read back with every slip named.

UTF-8 with a byte order mark (without one Excel takes it for its own code page), CRLF, newlines inside quoted cells.
A text cell that a spreadsheet would take for a formula gets an apostrophe in front; control characters are shown as
their pictures. Read back are the columns doc_id, decision, note and cache_id; separators `,` `;` and tab are
understood, and so is a file without the mark, because spreadsheets save what their locale says.
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.review.reviewer import Place, ReviewedDocument, Words
from storage_specs.command_line import nearest
from storage_specs.errors import CacheMismatchError, ConfigError
from storage_specs.reader import Cache

__all__ = ["COLUMNS", "DECISIONS", "Decision", "exclusion_lines", "read_sheet", "sheet_rows"]

DECISIONS = ("accept", "reject")
COLUMNS = (
    "rank",
    "decision",
    "note",
    "disagreement",
    "student_bits_per_byte",
    "teacher_bits_per_byte",
    "difference",
    "different_words",
    "bytes",
    "worst_places",
    "text",
    "kind",
    "split",
    "student",
    "doc_id",
    "cache_id",
)
READ = ("doc_id", "decision", "note", "cache_id")
TEXT_SHOWN = 6_000  # characters; a spreadsheet's cell holds 32,767
LARGEST_CELL = 1 << 24
FORMULA = re.compile(r"[=+\-@\t\r\n＝＋－＠]")
PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: 0x2421}


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A reviewer's word on a document, and the line of the sheet that says so. decision: accept, reject or nothing."""

    line: int
    doc_id: str
    decision: str
    note: str


def sheet_rows(documents: Sequence[ReviewedDocument], student: str, cache_id: str) -> list[dict[str, str]]:
    """The cells of every document, in order."""
    return [_row(rank, document, student, cache_id) for rank, document in enumerate(documents, 1)]


def _row(rank: int, document: ReviewedDocument, student: str, cache_id: str) -> dict[str, str]:
    figures = document.figures
    apart = document.different_words
    return {
        "rank": str(rank),
        "decision": "",
        "note": "",
        "disagreement": f"{figures.disagreement:.4f}",
        "student_bits_per_byte": f"{figures.student:.4f}",
        "teacher_bits_per_byte": f"{figures.teacher:.4f}",
        "difference": f"{figures.student - figures.teacher:.4f}",
        "different_words": "" if apart is None else f"{apart:.4f}",
        "bytes": str(figures.bytes),
        "worst_places": _text("\n".join(place_text(place) for place in document.places)),
        "text": _text(shown_text(document)),
        "kind": document.kind,
        "split": "held_out" if document.held_out else "train",
        "student": _text(student),
        "doc_id": document.doc_id,
        "cache_id": cache_id,
    }


def place_text(place: Place) -> str:
    """A worst place on one line."""
    quoted = f"{place.before}[[{place.quoted}]]{place.after}".replace("\n", " ")
    said = [f"student {place.student_bits:.1f} bits, teacher {place.teacher_bits:.1f}"]
    for who, words in (("student", place.student_words), ("teacher", place.teacher_words)):
        said += [f"{who} expects {words_text(words)}"] if words else []
    return f"{quoted}  ({'; '.join(said)})"


def words_text(words: Words) -> str:
    """Words with their probabilities."""
    return ", ".join(f"{word!r} {probability:.0%}" for word, probability in words)


def shown_text(document: ReviewedDocument) -> str:
    """The document for a reader: roles in front of messages, a long one cut, control characters as pictures."""
    if document.kind == "text":
        text = "".join(content for _, content in document.messages)
    else:
        text = "\n".join(f"[{role}]\n{content}" for role, content in document.messages)
    return text[:TEXT_SHOWN] + (f" ... ({len(text) - TEXT_SHOWN:,} characters more)" if len(text) > TEXT_SHOWN else "")


def visible(text: str) -> str:
    """Control characters but tab and newline as their pictures (U+2400 and on)."""
    return text.translate(PICTURES)


def _text(text: str) -> str:
    """A text cell that no spreadsheet calculates."""
    text = visible(text)
    return f"'{text}" if FORMULA.match(text) else text


def as_csv(rows: Sequence[dict[str, str]]) -> str:
    """The whole file, its mark included."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, COLUMNS, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return "\ufeff" + buffer.getvalue()


def read_sheet(path: Path, cache: Cache) -> list[Decision]:
    """What the reviewers decided, in the sheet's order, documents without a decision included.

    Raises ConfigError, naming the line: no such file, not UTF-8 (a spreadsheet's own code page), not CSV, a column that
    is missing, a document that the cache does not hold, a document twice, a decision that is none of accept, reject and
    nothing; CacheMismatchError for a sheet of another cache (repairs of it are the same).
    """
    known, ours = set(cache.doc_ids), {cache.manifest.cache_id, *cache.manifest.replaces}
    found: dict[str, Decision] = {}
    for line, cells in _cells(path):
        place = f"sheet {path}, line {line}"
        doc_id, decision, note, cache_id = (cells[name].strip() for name in READ)
        if not any(cells.values()):
            continue
        if cache_id not in ours:
            raise CacheMismatchError(
                f"{place}: it was made of cache {cache_id!r}, but --cache {cache.path} is "
                f"{cache.manifest.cache_id!r}: name the cache that was reviewed"
            )
        if doc_id not in known:
            raise ConfigError(f"{place}: doc_id {doc_id[:80]!r} is not in cache {cache.path}: restore the cell")
        if doc_id in found:
            raise ConfigError(f"{place}: document {doc_id} stands in line {found[doc_id].line} too: leave one of them")
        if (chosen := decision.lower()) not in ("", *DECISIONS):
            raise ConfigError(
                f"{place}: decision {decision[:40]!r} must be accept, reject or nothing{nearest(chosen, DECISIONS)}"
            )
        note = note[1:] if note[:1] == "'" and FORMULA.match(note[1:]) else note
        found[doc_id] = Decision(line=line, doc_id=doc_id, decision=chosen, note=note)
    return list(found.values())


def _cells(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(first line, cells by column name) of every row behind the header."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"sheet {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"sheet {path}: is not UTF-8: save it as `CSV UTF-8`") from None
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    csv.field_size_limit(LARGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line, names = 1, []
    try:
        names = [name.strip() for name in next(reader, [])]
        for name in READ:
            if name not in names:
                raise ConfigError(
                    f"sheet {path}, line 1: there is no column {name!r}{nearest(name, names)}; keep the header of the "
                    "sheet that `distill review` wrote"
                )
        line = reader.line_num + 1
        for row in reader:
            if len(row) > len(names) or (row and len(row) < len(names)):
                raise ConfigError(f"sheet {path}, line {line}: {len(row)} cells under {len(names)} columns")
            yield line, dict(zip(names, row or [""] * len(names), strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(f"sheet {path}, line {line}: not CSV ({error})") from None


def exclusion_lines(decisions: Sequence[Decision], cache_id: str) -> list[str]:
    """The list for `distill train --exclude_documents`: what was rejected, and why."""
    counted = {name: sum(each.decision == name for each in decisions) for name in (*DECISIONS, "")}
    lines = [
        "# for distill train --exclude_documents",
        f"# cache {cache_id}: {counted['reject']} rejected, {counted['accept']} accepted, {counted['']} undecided",
    ]
    for each in decisions:
        if each.decision == "reject":
            note = " ".join(visible(each.note).split())
            lines.append(f"{each.doc_id}  # {note}" if note else each.doc_id)
    return lines

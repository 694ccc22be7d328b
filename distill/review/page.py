"""The sheet of a review as one HTML page: cards with figures and quoted places, accept or reject, a note, and a button.

The button saves the decisions as the CSV that `distill review --apply` reads. Nothing is fetched and nothing is sent:
a content security policy in the page forbids it, all text is escaped, and the data is JSON that no markup can leave.
"""

import json
from collections.abc import Sequence
from html import escape

from distill.review.reviewer import Place, ReviewedDocument
from distill.review.sheet import COLUMNS, DECISIONS, shown_text, visible, words_text

__all__ = ["as_page"]

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:62em;margin:1em auto;padding:0 1em;color:#222}
article{border:1px solid #bbb;border-radius:.5em;padding:.5em 1em;margin:1em 0}
article:has(input[value=reject]:checked){background:#fee}article:has(input[value=accept]:checked){background:#efe}
pre,blockquote{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f6;padding:.5em;margin:.4em 0}
mark{background:#fc6}label{margin-right:1em}input[type=text]{width:60%}header{position:sticky;top:0;background:#fff;
padding:.5em 0;border-bottom:1px solid #bbb}td,th{padding:0 1em 0 0;text-align:left}small{color:#666}"""

SCRIPT = """"use strict";
const {columns, rows} = JSON.parse(document.getElementById("rows").textContent);
const FORMULA = /^[=+\\-@\\t\\r\\n\\uff1d\\uff0b\\uff0d\\uff20]/;
let unsaved = false;
function sheet() {
  const lines = [columns];
  rows.forEach((cells, n) => {
    const chosen = document.querySelector(`input[name="decision-${n}"]:checked`);
    const note = document.querySelector(`input[name="note-${n}"]`).value;
    const filled = {...cells, decision: chosen ? chosen.value : "", note: FORMULA.test(note) ? "'" + note : note};
    lines.push(columns.map(name => filled[name]));
  });
  const quoted = cell => '"' + cell.replaceAll('"', '""') + '"';
  return "\\ufeff" + lines.map(line => line.map(quoted).join(",") + "\\r\\n").join("");
}
function count() {
  const decided = document.querySelectorAll("input[type=radio]:not([value='']):checked").length;
  document.getElementById("count").textContent = `${decided} of ${rows.length} decided`;
}
document.addEventListener("input", () => { unsaved = true; count(); });
document.getElementById("save").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([sheet()], {type: "text/csv;charset=utf-8"}));
  link.download = document.body.dataset.file;
  link.click();
  unsaved = false;
});
window.addEventListener("beforeunload", event => { if (unsaved) event.preventDefault(); });
count();
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; form-action 'none'"


def as_page(documents: Sequence[ReviewedDocument], rows: Sequence[dict[str, str]], title: str, file: str) -> str:
    """The whole page. rows: the same documents as CSV cells; file: the name under which decisions are saved."""
    data = json.dumps({"columns": COLUMNS, "rows": list(rows)}, ensure_ascii=False).replace("<", "\\u003c")
    cards = [_card(number, document) for number, document in enumerate(documents)]
    return "\n".join(
        [
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>",
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><style>{STYLE}</style>',
            f'<body data-file="{escape(file)}"><h1>{escape(title)}</h1>',
            "<p>Most disputed first. <b>Accept</b>: the text is good, the student has to learn it. <b>Reject</b>: the "
            "text, or what the teacher expects there, is wrong, and nothing should be trained on it. Undecided "
            "documents stay in. Bits are of surprise: more = less expected.</p>",
            "<header><button id=save>Save decisions as CSV</button> <span id=count></span> <small>then: distill review "
            "--apply FILE --cache CACHE --output_file excluded.txt</small></header>",
            *cards,
            f'<script type="application/json" id=rows>{data}</script><script>{SCRIPT}</script></body></html>',
            "",
        ]
    )


def _card(number: int, document: ReviewedDocument) -> str:
    figures = document.figures
    cells = {
        "disagreement": f"{figures.disagreement:.3f}",
        "student": f"{figures.student:.3f}",
        "teacher": f"{figures.teacher:.3f}",
        "difference": f"{figures.student - figures.teacher:+.3f}",
        "bytes compared": f"{figures.bytes:,}",
    }
    if document.different_words is not None:
        cells["on different words"] = f"{document.different_words:.0%}"
    head = "".join(f"<th>{name}</th>" for name in cells)
    body = "".join(f"<td>{value}</td>" for value in cells.values())
    choices = "".join(
        f'<label><input type=radio name="decision-{number}" value="{value}"{" checked" if not value else ""}> '
        f"{value or 'undecided'}</label>"
        for value in (*DECISIONS, "")
    )
    return "\n".join(
        [
            f"<article><h2>{number + 1}. <small>{escape(document.kind)}, "
            f"{'held out' if document.held_out else 'train'}, {document.doc_id[:12]}</small></h2>",
            f"<table><tr>{head}</tr><tr>{body}</tr></table><small>bits per byte</small>",
            *map(_place, document.places),
            f"<details><summary>text</summary><pre>{_escaped(shown_text(document))}</pre></details>",
            f'<p>{choices} <input type=text name="note-{number}" placeholder="note" aria-label="note"></p></article>',
        ]
    )


def _place(place: Place) -> str:
    expected = [
        f"{who} expects {_escaped(words_text(words))}"
        for who, words in (("student", place.student_words), ("teacher", place.teacher_words))
        if words
    ]
    said = "; ".join([f"student {place.student_bits:.1f} bits, teacher {place.teacher_bits:.1f}", *expected])
    return (
        f"<blockquote>{_escaped(place.before)}<mark>{_escaped(place.quoted)}</mark>{_escaped(place.after)}<br>"
        f"<small>{said}</small></blockquote>"
    )


def _escaped(text: str) -> str:
    return escape(visible(text))

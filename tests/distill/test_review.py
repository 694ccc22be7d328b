"""`distill review`: what a reviewer is shown, an interrupted review that goes on, and decisions that are read back."""

import csv
import json
import math
import re
from html.parser import HTMLParser

import pytest
from cache_making import write_cache

from distill.evaluation.report import read_report
from distill.exclusions import read_exclusions
from distill.main import main
from distill.review.sheet import COLUMNS, FORMULA
from distill.scoring import score, shared_regions, teacher_scores
from distill.students import load_model, load_tokenizer
from storage_specs import completion_document, is_held_out, open_cache, text_document
from storage_specs.errors import AlignmentError, CacheMismatchError, ConfigError, EvaluationError

NASTY = '=HYPERLINK("http://x")\x00 </script><script>alert(1)</script> <img src=x onerror=alert(2)>\r\nnext, "line" 😀'


@pytest.fixture(scope="module")
def cache_path(wiki_texts, gemma_tokenizer, tmp_path_factory):
    """Texts of all kinds of trouble for a sheet, and ordinary ones."""
    texts = [text_document(text[: 80 + 20 * n]) for n, text in enumerate(wiki_texts[:24])]
    texts += [text_document(NASTY), completion_document("+1\n", NASTY[1:]), completion_document("nothing scored", "")]
    return write_cache(tmp_path_factory.mktemp("review") / "cache", texts, gemma_tokenizer)


@pytest.fixture(scope="module")
def sheet(cache_path, student_path, tmp_path_factory):
    """The CSV and HTML of all documents."""
    path = tmp_path_factory.mktemp("sheets") / "sheet.csv"
    assert main(command(cache_path, student_path, path, path.with_suffix(".html"), "--split", "all")) == 0
    assert sorted(each.name for each in path.parent.iterdir()) == ["sheet.csv", "sheet.html"]
    return path


def command(cache_path, student_path, *paths_and_more) -> list[str]:
    paths = [word for path in paths_and_more if not isinstance(path, str) for word in ("--output_file", str(path))]
    more = [word for word in paths_and_more if isinstance(word, str)]
    return [
        "review",
        "--cache",
        str(cache_path),
        "--model",
        f"tiny={student_path}",
        "--max-length",
        "256",
        *paths,
        *more,
    ]


def read(path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_the_sheet_holds_every_document_by_disagreement(sheet, cache_path, student_path):
    rows, cache = read(sheet), open_cache(cache_path)
    assert list(rows[0]) == list(COLUMNS)
    assert sheet.read_bytes().startswith(b"\xef\xbb\xbf")
    assert [row["rank"] for row in rows] == [str(n) for n in range(1, len(rows) + 1)]
    disagreements = [float(row["disagreement"]) for row in rows]
    assert disagreements == sorted(disagreements, reverse=True)
    by_id = {row["doc_id"]: row for row in rows}
    documents = [document for document in cache if len(document.segment)]
    assert set(by_id) == {document.doc_id for document in documents}
    student = (load_model(str(student_path), "float32").eval(), load_tokenizer(str(student_path)))
    found = score(*student, documents, max_length=256)
    for document, scores in zip(documents, found, strict=True):
        row, regions = by_id[document.doc_id], shared_regions([scores, teacher_scores(document)])
        assert int(row["bytes"]) == sum(end - start for _, start, end in regions)
        assert row["split"] == ("held_out" if is_held_out(document.doc_id) else "train")
        gap = float(row["student_bits_per_byte"]) - float(row["teacher_bits_per_byte"])
        assert float(row["difference"]) == pytest.approx(gap, abs=2e-4)
        # A random model of 49,152 words: near ln(49152) nats per token that both score, wherever it is cut.
        inside = [(scores.byte_end > start) & (scores.byte_end <= end) & ~scores.is_end for _, start, end in regions]
        tokens = sum(int(rows_R.sum()) for rows_R in inside)
        per_token = float(row["student_bits_per_byte"]) * int(row["bytes"]) / tokens
        assert per_token == pytest.approx(math.log2(49_152), rel=0.1)
        assert 0 < float(row["different_words"]) <= 1
        assert row["worst_places"].count("teacher expects") == row["worst_places"].count("\n") + 1
        assert re.search(r"student expects '.+' \d+%", row["worst_places"])


def test_no_cell_is_a_formula_and_no_text_is_markup(sheet, cache_path):
    for row in read(sheet):
        for name in ("text", "worst_places", "student", "note"):
            assert not FORMULA.match(row[name]), row[name]
            assert "\x00" not in row[name]
    assert any(row["text"].startswith("'=HYPERLINK") for row in read(sheet))
    page = sheet.with_suffix(".html").read_text(encoding="utf8")

    class Tags(HTMLParser):
        """Which elements a page has, its scripts' contents, and every attribute that could fetch something."""

        found: list[str] = []  # noqa: RUF012
        scripts: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag, attrs):
            self.found.append(tag)
            assert not {"src", "href", "onerror", "onclick", "action"} & {name for name, _ in attrs}

        def handle_data(self, data):
            if self.lasttag == "script":
                self.scripts.append(data)

    tags = Tags()
    tags.feed(page)
    assert "img" not in tags.found
    assert tags.found.count("script") == 2
    data = json.loads(tags.scripts[0])
    assert data == {"columns": list(COLUMNS), "rows": read(sheet)}
    assert "default-src 'none'" in page
    assert tags.found.count("article") == len(data["rows"])


def test_chats_show_who_speaks(chat_cache_path, student_path, tmp_path):
    path = tmp_path / "chats.csv"
    assert main(command(chat_cache_path, student_path, path, "--split", "all", "--top", "2")) == 0
    rows, cache = read(path), open_cache(chat_cache_path)
    assert len(rows) == 2
    for row in rows:
        document = next(document for document in cache if document.doc_id == row["doc_id"])
        turns = [f"[{m.role}]\n{document.content(n)}" for n, m in enumerate(document.messages)]
        assert row["text"] == "\n".join(turns)
        for line in row["worst_places"].splitlines():  # quoted inside the turn that it belongs to
            place = line.partition("  (student")[0].replace("[[", "").replace("]]", "").removeprefix("'")
            assert any(place in turn.replace("\n", " ") for turn in turns[1::2]), line


def test_an_interrupted_review_goes_on(sheet, cache_path, student_path, tmp_path, monkeypatch):
    from distill.review import reviewer as review

    path, scored, whole = tmp_path / "again.csv", [], review.score

    def interrupted(model, tokenizer, documents, **options):
        if len(scored) >= 2:
            raise KeyboardInterrupt
        scored.append(len(documents))
        return whole(model, tokenizer, documents, **options)

    flags = command(cache_path, student_path, path, "--batch_size", "1", "--split", "all", "--top", "5")
    with monkeypatch.context() as patch:
        patch.setattr(review, "score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(flags)
    progress = tmp_path / ".again.csv.progress"
    assert not path.exists()
    progress.write_bytes(progress.read_bytes() + b"[8, [1, 2")  # and was killed while it wrote
    kept = progress.read_bytes()
    with pytest.raises(EvaluationError, match=r"of other, unfinished work .*split 'all', now 'train'"):
        main([word if word != "all" else "train" for word in flags])
    assert kept.startswith(progress.read_bytes())  # but for the line that was cut off
    rest = []

    def counted(model, tokenizer, documents, **options):
        rest.append(len(documents))
        return whole(model, tokenizer, documents, **options)

    monkeypatch.setattr(review, "score", counted)
    assert main(flags) == 0
    assert (scored, rest) == ([8, 8], [8, 2, *[1] * 5])
    assert not progress.exists()
    assert [row["doc_id"] for row in read(path)] == [row["doc_id"] for row in read(sheet)[:5]]


def test_decisions_come_back_as_a_list_for_training(sheet, cache_path, student_path, tmp_path, capsys):
    rows = read(sheet)
    rows[0] |= {"decision": "Reject ", "note": "'=two\nlines # of note"}
    rows[1] |= {"decision": "accept"}
    rows[2] |= {"decision": "reject"}
    saved = tmp_path / "saved.csv"
    for delimiter, encoding in ((",", "utf-8-sig"), (";", "utf-8"), ("\t", "utf-8")):  # what spreadsheets make of it
        with saved.open("w", encoding=encoding, newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, delimiter=delimiter)
            writer.writeheader()
            writer.writerows([*rows, dict.fromkeys(COLUMNS, "")])
        out = tmp_path / "excluded.txt"
        assert main(["review", "--cache", str(cache_path), "--apply", str(saved), "--output_file", str(out)]) == 0
        assert read_exclusions(out) == [rows[0]["doc_id"], rows[2]["doc_id"]]
        assert f"{rows[0]['doc_id']}  # =two lines # of note\n" in out.read_text()
        assert f"2 rejected, 1 accepted, {len(rows) - 3} undecided" in capsys.readouterr().out
    second = tmp_path / "second.csv"
    flags = ("--split", "all", "--exclude_documents", str(out))
    assert main(command(cache_path, student_path, second, *flags)) == 0
    assert {row["doc_id"] for row in rows} - {row["doc_id"] for row in read(second)} == set(read_exclusions(out))


def test_an_excluded_document_is_not_evaluated_on(cache_path, student_path, tmp_path):
    held_out = [document.doc_id for document in open_cache(cache_path) if is_held_out(document.doc_id)]
    reports = {}
    for name, excluded in (("all", []), ("without", held_out[:1])):
        (tmp_path / name).write_text("".join(f"{doc_id}\n" for doc_id in excluded))
        flags = ["--exclude_documents", str(tmp_path / name), "--output_file", str(tmp_path / f"{name}.json")]
        model = ["--model", f"tiny={student_path}", "--max_length", "256"]
        assert main(["evaluate", "--cache", str(cache_path), *model, *flags]) == 0
        reports[name] = read_report(tmp_path / f"{name}.json").subjects["cache"]
    assert reports["all"]["documents"] - reports["without"]["documents"] == 1
    assert reports["all"]["exclude_documents"] is None
    assert reports["without"]["exclude_documents"].startswith("1 documents, ")


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (
            lambda rows: rows[2].update(decision="rejct"),
            ConfigError,
            r"line \d+: decision 'rejct' .*mean 'reject'",
        ),
        (lambda rows: rows[2].update(doc_id="f" * 64), ConfigError, r"line \d+: doc_id 'f+' is not in cache"),
        (lambda rows: rows[2].update(rows[0]), ConfigError, r"line \d+: document .* stands in line 2 too"),
        (lambda rows: rows[0].update(cache_id="0" * 64), CacheMismatchError, "line 2: it was made of cache '0"),
        (lambda rows: [row.pop("decision") for row in rows], ConfigError, "line 1: there is no column 'decision'"),
        (lambda rows: rows.clear(), ConfigError, "line 1: there is no column 'doc_id'"),
    ],
)
def test_sheets_that_cannot_be_read_back(sheet, cache_path, tmp_path, change, error, says):
    rows, saved = read(sheet), tmp_path / "saved.csv"
    change(rows)
    with saved.open("w", encoding="utf8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(error, match=says) as caught:
        main(["review", "--cache", str(cache_path), "--apply", str(saved), "--output_file", str(tmp_path / "x.txt")])
    if "line \\d" in says:  # the line where the row begins, although cells hold newlines
        line = int(re.search(r"line (\d+):", str(caught.value))[1])
        assert saved.read_bytes().decode().split("\n")[line - 1].startswith(f"{rows[2]['rank']},")
    assert not (tmp_path / "x.txt").exists()


def test_files_that_are_no_sheets(cache_path, tmp_path):
    saved = tmp_path / "saved.csv"
    for data, says in (
        ("doc_id;decision;note;cache_id\r\nü".encode("cp1252"), "not UTF-8"),
        (b"doc_id,decision,note,cache_id\r\na,b\r\n", "line 2: 2 cells under 4 columns"),
        (b'doc_id,decision,note,cache_id\r\n"a"b,c,d,e\r\n', "line 2: not CSV"),
        (None, "cannot be read"),
    ):
        saved.unlink(missing_ok=True) if data is None else saved.write_bytes(data)
        with pytest.raises(ConfigError, match=says):
            main(["review", "--cache", str(cache_path), "--apply", str(saved), "--output_file", str(tmp_path / "x")])


def test_reviews_that_cannot_be(cache_path, student_path, tmp_path):
    out = tmp_path / "sheet.csv"
    for error, says, flags in (
        (ConfigError, "NAME=MODEL", ["review", "--cache", str(cache_path), "--output_file", str(out)]),
        (ConfigError, "one .csv, one .html", command(cache_path, student_path, tmp_path / "sheet.xlsx")),
        (ConfigError, "one .csv, one .html", command(cache_path, student_path, out, tmp_path / "b.csv")),
        (ConfigError, "is a folder", command(cache_path, student_path, tmp_path)),
        (ConfigError, "split", command(cache_path, student_path, out, "--split", "test")),
        (ConfigError, "leave out --model", command(cache_path, student_path, out, "--apply", str(out))),
        (ConfigError, "at most 256", command(cache_path, student_path, out, "--max_length", "512")),
        (ConfigError, "JSON object", command(cache_path, student_path, out, "--chat_template_kwargs", "[1]")),
    ):
        with pytest.raises(error, match=says):
            main(flags)
        assert not out.exists()
    excluded = tmp_path / "all.txt"
    excluded.write_text("\n".join(open_cache(cache_path).doc_ids))
    with pytest.raises(AlignmentError, match="none of its 0 documents"):
        main(command(cache_path, student_path, out, "--exclude_documents", str(excluded)))

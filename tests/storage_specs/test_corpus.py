"""Every input form gives the same documents; every bad input names its place."""

import gzip
import json
import sys
import types
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage_specs.corpus import read_corpus
from storage_specs.document import chat_document, completion_document, text_document
from storage_specs.errors import ConfigError, CorpusError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes 😀"}]
RECORDS = [
    {"text": "one\r\n\x00 é", "source": "a", "stars": 3},
    {"prompt": "2+2=", "completion": "4"},
    {"messages": CHAT, "source": "b"},
    {"text": ""},
]
DOCUMENTS = [
    text_document("one\r\n\x00 é", {"source": "a", "stars": 3}),
    completion_document("2+2=", "4"),
    chat_document(CHAT, {"source": "b"}),
    text_document(""),
]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf8")
    return path


def documents(path: Path | str, **options: Any) -> list[Any]:
    return list(read_corpus(str(path), **options))


def test_jsonl_of_all_kinds(tmp_path: Path) -> None:
    assert documents(write_jsonl(tmp_path / "a.jsonl", RECORDS)) == DOCUMENTS


def test_json_array_gzip_bom_blank_lines_and_crlf(tmp_path: Path) -> None:
    (tmp_path / "array.json").write_text(json.dumps(RECORDS, indent=1), encoding="utf8")
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(b"\n".join(json.dumps(r).encode() for r in RECORDS)))
    lines = b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(record).encode() for record in RECORDS)
    (tmp_path / "windows.jsonl").write_bytes(lines)
    (tmp_path / "late.json").write_text("\n \r\n" + json.dumps(RECORDS, indent=1), encoding="utf8")
    for name in ("array.json", "packed.jsonl.gz", "windows.jsonl", "late.json"):
        assert documents(tmp_path / name) == DOCUMENTS


def test_line_separators_inside_strings_do_not_split_lines(tmp_path: Path) -> None:
    text = "a\u2028b\x85c\x1cd"
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf8", newline=""
    )
    assert documents(tmp_path / "a.jsonl") == [text_document(text)]


def test_parquet_gives_the_same_documents_as_jsonl(tmp_path: Path) -> None:
    chats = [{"messages": [*CHAT, {"role": "tool", "content": "x", "name": "calculator"}]}, {"messages": CHAT}]
    for records in ([RECORDS[0], RECORDS[3]], [RECORDS[1]], chats):
        pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet", row_group_size=1)
        assert documents(tmp_path / "a.parquet") == documents(write_jsonl(tmp_path / "a.jsonl", records))


def test_folder_is_recursive_sorted_and_passes_over_hidden_and_foreign_files(tmp_path: Path) -> None:
    for name, text in {"b.txt": "B\r\n", "a/z.md": "Z", "a/y.txt": "", ".hidden.txt": "no", ".git/x.txt": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert [document.text for document in documents(tmp_path)] == ["", "Z", "B\r\n"]


def test_saved_datasets_folder_is_read_without_the_datasets_package(tmp_path: Path) -> None:
    """The layout of `DatasetDict.save_to_disk`."""
    folder = tmp_path / "train"
    folder.mkdir()
    for number, record in enumerate([RECORDS[0], {"text": "two", "source": None, "stars": 1}]):
        table = pa.Table.from_pylist([record])
        with (
            pa.OSFile(str(folder / f"data-{number}.arrow"), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as out,
        ):
            out.write_table(table)
    state = {"_data_files": [{"filename": "data-0.arrow"}, {"filename": "data-1.arrow"}], "_indices_files": None}
    (folder / "state.json").write_text(json.dumps(state))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    expected = [DOCUMENTS[0], text_document("two", {"stars": 1})]
    assert documents(folder) == documents(tmp_path) == expected
    with pytest.raises(CorpusError, match="--split one of train"):
        documents(tmp_path, split="test")
    with pytest.raises(CorpusError, match="one split of a saved dataset has nothing for --split to choose"):
        documents(folder, split="train")
    with pytest.raises(CorpusError, match="a saved dataset has nothing for --subset to choose"):
        documents(tmp_path, subset="en")


def test_a_choice_that_files_do_not_have_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"text": "one"}\n')
    assert documents(file) == documents(tmp_path) == [text_document("one")]
    with pytest.raises(CorpusError, match="a file has nothing for --split and --subset to choose: leave it out"):
        documents(file, split="train", subset="en")
    with pytest.raises(CorpusError, match="a folder of files has nothing for --split"):
        documents(tmp_path, split="train")


def test_hub_name_needs_datasets_and_goes_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match="pip install datasets"):
        documents("owner/name")
    asked = []
    module = types.ModuleType("datasets")
    module.load_dataset = lambda *name, split: asked.append((*name, split)) or iter([{"text": "hub"}])
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert documents("owner/name", split="test", subset="en") == [text_document("hub")]
    assert asked == [("owner/name", "en", "test")]


def test_conversational_prompt_and_completion_score_only_the_completion(tmp_path: Path) -> None:
    record = {
        "prompt": [*CHAT, {"role": "user", "content": "more"}],
        "completion": [{"role": "assistant", "content": "no"}],
    }
    (document,) = documents(write_jsonl(tmp_path / "a.jsonl", [record]))
    assert document.kind == "chat"
    assert [message.scored for message in document.messages] == [False, False, False, True]
    assert document.scored_spans.tolist() == [[len(document.text.encode()) - 2, len(document.text.encode())]]


def test_messages_win_over_prompt_and_kind_forces_the_fields(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT, "text": "t", "prompt": "p"}])
    assert documents(path)[0].kind == "chat"
    assert documents(path)[0].metadata == {"text": "t", "prompt": "p"}
    assert documents(path, kind="text")[0].text == "t"
    with pytest.raises(CorpusError, match=r"a\.jsonl:1: a completion record needs the field 'completion'"):
        documents(path, kind="completion")
    with pytest.raises(ConfigError, match="kind is 'chats'"):
        documents(path, kind="chats")


def test_min_bytes_counts_utf8_and_max_documents_counts_what_is_kept(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("a", "é", "bc", "def")])
    assert [item.text for item in documents(path, min_bytes=2)] == ["é", "bc", "def"]
    assert [item.text for item in documents(path, min_bytes=2, max_documents=2)] == ["é", "bc"]
    with pytest.raises(CorpusError, match="none of its 4 documents has 9 bytes"):
        documents(path, min_bytes=9)


def test_fields_that_are_no_json_are_left_out_with_one_warning(tmp_path: Path) -> None:
    rows = [{"text": "a", "when": date(2020, 1, 1), "n": 1}, {"text": "b", "when": date(2020, 1, 2), "n": 2}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match="field 'when' is no JSON value") as caught:
        assert [document.metadata for document in documents(tmp_path / "a.parquet")] == [{"n": 1}, {"n": 2}]
    assert len(caught) == 1


BAD_LINES = {
    b'{"text": "\xff"}': r"a\.jsonl:2: invalid UTF-8 at byte 10",
    b'{"text": ': r"a\.jsonl:2: not JSON",
    b"[" * 100_000: r"a\.jsonl:2: not JSON",
    b'"text"': r"a\.jsonl:2: expected an object with fields, found str",
    b'{"text": "\\ud800 cut"}': r"a\.jsonl:2: text holds a lone surrogate .* at character 0",
    b'{"text": 5}': r"a\.jsonl:2: text must be a string, found int",
    b'{"text": null, "body": "x"}': r"a\.jsonl:2: needs the field `text`.*found: 'text', 'body'",
    b"{}": r"a\.jsonl:2: needs the field `text`.*found: none",
    b'{"prompt": "x"}': r"a\.jsonl:2: needs the field",
    b'{"prompt": "x", "completion": ["y"]}': r"a\.jsonl:2: completion must be a string, found list",
    b'{"messages": []}': r"a\.jsonl:2: messages must be a list of messages",
    b'{"messages": "hi"}': r"a\.jsonl:2: messages must be a list of messages, found str",
    b'{"messages": ["hi"]}': r"a\.jsonl:2: messages\[0\] must be an object with role and content",
    b'{"messages": [{"content": "x"}]}': r"messages\[0\]\.role must be a string",
    b'{"messages": [{"role": "user"}]}': r"messages\[0\]\.content must be a string",
    b'{"messages": [{"role": "user", "content": [{}]}]}': r"messages\[0\]\.content must be a string, found list",
    b'{"messages": [{"role": "user", "content": "\\udc00"}]}': r"messages\[0\]\.content holds a lone surrogate",
    b'{"messages": [{"role": "user", "content": "x", "name": "\\udc00"}]}': r"messages\[0\] holds what is no JSON text",
    b'{"text": "x", "tools": [{}]}': r"`tools` are not rendered",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_records_name_file_and_line(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(CorpusError, match=BAD_LINES[line]):
        documents(tmp_path / "a.jsonl")


def test_missing_empty_and_unknown_sources(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n \n")
    (tmp_path / "x.csv").write_bytes(b"a,b")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin1"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "folder").mkdir()
    for name, message in {
        "absent.jsonl": "no such file or folder",
        "absent": "no such file or folder",
        "empty.jsonl": "is empty: it holds no record",
        "x.csv": "its name must end in one of",
        "latin.txt": r"latin\.txt: invalid UTF-8 at byte 3",
        "broken.parquet": "not a readable Parquet file",
        "broken.jsonl.gz": "cannot be read",
        "folder": "no file in this folder ends in one of",
    }.items():
        with pytest.raises(CorpusError, match=message):
            documents(tmp_path / name)


TALK = [("system", "s"), ("user", "u"), ("assistant", "a"), ("tool", "t"), ("critic", "c"), ("assistant", "b")]


@pytest.mark.parametrize(
    ("roles", "scored"), [(("assistant",), "ab"), (("user", "assistant"), "uab"), (("critic", "tool"), "c")], ids=str
)
def test_scored_roles_and_never_tool_results(tmp_path: Path, roles: tuple[str, ...], scored: str) -> None:
    turns = [{"role": role, "content": content} for role, content in TALK]
    lines = [{"messages": turns}, {"prompt": turns[:3], "completion": turns[3:]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf8")
    chat, prompted = read_corpus(str(tmp_path / "a.jsonl"), score_roles=roles)
    assert "".join(chat.content(n) for n, message in enumerate(chat.messages) if message.scored) == scored
    behind = "".join(content for role, content in TALK[3:] if role in roles and role != "tool")
    assert "".join(prompted.content(n) for n, m in enumerate(prompted.messages) if m.scored) == behind


def test_every_damage_of_a_gzip_file_is_a_corpus_error(tmp_path: Path) -> None:
    """Deflate, checksum, header and end: zlib, gzip and the file system each have their own exception."""
    data = gzip.compress("\n".join(json.dumps({"text": f"line {n}"}) for n in range(200)).encode(), mtime=0)
    path = tmp_path / "a.jsonl.gz"
    for place in range(0, len(data), 7):
        if 4 <= place <= 9:  # the header's time and system, which nothing checks
            continue
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        with pytest.raises(CorpusError):
            documents(path)
    path.write_bytes(data[:-20])
    with pytest.raises(CorpusError, match="cannot be read"):
        documents(path)

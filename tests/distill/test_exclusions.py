"""Excluded documents: never in a batch nor in what is held out, part of what makes a run itself, and lists that lie."""

import json

import pytest
from training import load_tokenizer, trainer

from distill.checkpoint import RECORD
from distill.dataset import CachedDocuments
from distill.exclusions import Exclusions, read_exclusions
from distill.held_out import held_out_documents
from distill.main import main
from distill.trainer import CachedDistillationTrainer
from storage_specs import open_cache
from storage_specs.errors import AlignmentError, CheckpointError, ConfigError

STRANGER = "0" * 64


@pytest.fixture(scope="module")
def rejected(cache_path) -> list[str]:
    """Every third of the documents to train on."""
    documents = CachedDocuments(cache_path)
    return [documents[number].doc_id for number in range(0, len(documents), 3)]


def test_no_batch_and_no_evaluation_holds_an_excluded_document(cache_path, student_path, rejected, tmp_path):
    plain = trainer(cache_path, student_path, tmp_path, eval_strategy="epoch")
    whole = CachedDocuments(cache_path)
    documents = CachedDocuments(cache_path, excluded=Exclusions(whole.cache, [*rejected, STRANGER]))
    told = f"excluded by the list: {len(rejected)} documents (1 more in the list are not in this cache)"
    assert str(documents.excluded) == told
    assert len(documents) == len(documents.text_bytes) == len(whole) - len(rejected)
    without = CachedDistillationTrainer(plain.model, plain.args, documents, load_tokenizer(student_path))

    def seen(one: CachedDistillationTrainer) -> set[str]:
        return {doc_id for batch in one.get_train_dataloader() for doc_id in batch["doc_ids"]}

    assert seen(plain) - seen(without) == set(rejected)
    assert without.run["exclude_documents"].startswith(f"{len(rejected)} documents, sha256 ")
    assert plain.run["exclude_documents"] is None
    held_out = held_out_documents(whole.cache).sample(99)
    documents.excluded = Exclusions(whole.cache, [document.doc_id for document in held_out])
    with pytest.raises(AlignmentError, match="no held-out"):
        CachedDistillationTrainer(plain.model, plain.args, documents, load_tokenizer(student_path))


def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))


def test_another_list_is_another_run(cache_path, student_path, rejected, tmp_path, capsys):
    lists = {name: tmp_path / f"{name}.txt" for name in ("all", "same", "fewer", "every")}
    write_lines(lists["all"], [f"{doc_id}  # page of ads" for doc_id in rejected])
    write_lines(lists["same"], ["# another order, and a document of another cache", STRANGER, *reversed(rejected)])
    write_lines(lists["fewer"], rejected[1:])
    write_lines(lists["every"], open_cache(cache_path).doc_ids)
    common = [
        "train",
        "--cache",
        str(cache_path),
        "--model_name_or_path",
        str(student_path),
        "--loss",
        "ce:1",
        "--use_cpu",
    ]
    common += ["--output_dir", str(tmp_path / "run"), "--max_length", "48", "--max_steps", "1"]
    assert main([*common, "--exclude-documents", str(lists["all"])]) == 0
    said = capsys.readouterr().err
    assert f"all.txt: {len(rejected)} documents\n" in said
    assert f"{len(CachedDocuments(cache_path)) - len(rejected)} documents, " in said
    record = json.loads((tmp_path / "run" / RECORD).read_text())
    assert record["run"]["exclude_documents"].startswith(f"{len(rejected)} documents")
    assert main([*common, "--exclude_documents", str(lists["same"])]) == 0
    assert "nothing to do" in capsys.readouterr().err
    for flags in ([], ["--exclude_documents", str(lists["fewer"])]):
        with pytest.raises(CheckpointError, match=r"another run .exclude_documents '8 documents"):
            main([*common, *flags])
    with pytest.raises(ConfigError, match="no document left to train on"):
        main([*common, "--exclude_documents", str(lists["every"])])


def test_lists_that_lie(cache_path, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(f"\ufeff# a spreadsheet's mark in front\n\n  {STRANGER}  # why\n", encoding="utf8")
    assert read_exclusions(path) == [STRANGER]
    with pytest.raises(ConfigError, match="none of its 1 documents is in cache"):
        Exclusions(open_cache(cache_path), read_exclusions(path), path)
    assert Exclusions(open_cache(cache_path), []).identity is None
    for text, says in (
        (f"{STRANGER}\n{STRANGER[1:]}\n", "line 2: '0"),
        ("A" * 64, "line 1"),
        ("doc_id\n", "'doc_id' is no doc_id"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=says):
            read_exclusions(path)
    path.write_bytes(b"\xff\xfe")
    for unreadable in (path, tmp_path / "none.txt"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_exclusions(unreadable)

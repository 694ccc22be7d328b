"""A cache without texts and the corpus that it was built from teach exactly what a cache with texts teaches."""

import json
from pathlib import Path

import pytest
from cache_making import write_cache
from safetensors.torch import load_file

from distill.main import main
from storage_specs.errors import CorpusError


@pytest.fixture(scope="module")
def textless_path(documents, gemma_tokenizer, tmp_path_factory) -> Path:
    return write_cache(tmp_path_factory.mktemp("caches") / "textless", documents, gemma_tokenizer, text=False)


@pytest.fixture(scope="module")
def corpus(documents, tmp_path_factory) -> Path:
    """The documents as a corpus in reversed order, and one more."""
    records = [{"text": "not in the cache"}]
    for document in reversed(documents):
        contents = [document.content(number) for number in range(len(document.messages))]
        names = ("text",) if document.kind == "text" else ("prompt", "completion")
        records.append(dict(zip(names, contents, strict=True)))
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf8")
    return file


def train(cache: Path, student: Path, output: Path, *more: str) -> dict:
    command = ["train", "--model_name_or_path", str(student), "--cache", str(cache), "--output_dir", str(output)]
    flags = ["--max_length", "48", "--per_device_train_batch_size", "4", "--max_steps", "3"]
    flags += ["--loss", "ce:1,uld:1.5,mapped:1"]
    assert main([*command, *flags, "--use_cpu", "--save_strategy", "no", *more]) == 0
    return load_file(output / "model.safetensors")


def test_the_same_weights_are_learned(cache_path, textless_path, corpus, student_path, tmp_path) -> None:
    with_texts = train(cache_path, student_path, tmp_path / "with")
    without = train(textless_path, student_path, tmp_path / "without", "--corpus", str(corpus))
    assert with_texts.keys() == without.keys()
    assert all(with_texts[name].equal(without[name]) for name in with_texts)


def test_no_corpus_or_another_is_an_error(textless_path, corpus, student_path, tmp_path) -> None:
    with pytest.raises(CorpusError, match=r"keeps no texts .*--corpus"):
        train(textless_path, student_path, tmp_path / "student")
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("".join(corpus.read_text(encoding="utf8").splitlines(keepends=True)[:-2]), encoding="utf8")
    with pytest.raises(CorpusError, match=r"2 of the cache's 25 documents are not in it"):
        train(textless_path, student_path, tmp_path / "student", "--corpus", str(shorter))
    report = ["align-report", "--cache", str(textless_path), "--student", str(student_path)]
    with pytest.raises(CorpusError, match="keeps no texts"):
        main(report)
    assert main([*report, "--corpus", str(corpus)]) == 0

"""The report's figures by hand and from the definitions, and the command that prints them."""

import json

import numpy as np
import pytest
from cache_making import cached_document

from distill.alignment_report import Report, alignment_report, verdict
from distill.main import main
from distill.numerals import numeral_rows
from storage_specs import open_cache
from storage_specs.errors import AlignmentError
from storage_specs.rendering import TokenSequence


def sequence_of(rows):
    """A student's rendering with one token of the template in front."""
    segment, byte_start, token_start, byte_end, is_end = (np.array(column) for column in zip(*rows, strict=True))
    return TokenSequence(
        prefix_ids=np.array([0]),
        ids=np.arange(len(rows)),
        segment=segment,
        byte_start=byte_start,
        token_start=token_start,
        byte_end=byte_end,
        is_end=is_end,
        scored=np.ones(len(rows), dtype=bool),
    )


def test_figures_by_hand():
    teacher = cached_document(
        [(0, 0, 0, 2, False), (0, 2, 2, 5, False), (0, 5, 5, 6, False), (0, 6, 6, 9, False), (0, 9, 9, 9, True)],
        text="ab1defghi",
        gold_logprob=np.log(np.array([0.5, 0.25, 0.1, 0.5, 0.25], dtype=np.float32)),
    )
    student = sequence_of(
        [(0, 0, 0, 3, False), (0, 3, 3, 5, False), (0, 5, 5, 6, False), (0, 6, 6, 9, False), (0, 9, 9, 9, True)]
    )
    report = Report(k=2, same_tokenizer=False, max_length=4)
    report.add(teacher, student, overlap=1)
    facts = report.facts()
    assert facts["scored_bytes"] == 9
    assert facts["one_to_one_bytes"] == 4 / 9
    assert facts["grouped_bytes"] == 1
    assert facts["modes"]["boundary"] == {"pairs": 4, "teacher_rows": 0.8, "student_positions": 0.8}
    assert facts["modes"]["merge"] == {"pairs": 4, "teacher_rows": 1, "student_positions": 1}
    assert facts["positional_at_same_byte"] == 0.8
    assert facts["groups"][0] == {"student": 2, "teacher": 2, "groups": 1, "bytes": 5 / 9}
    assert facts["numerals"] == 0.2
    assert facts["gold_rank"] == pytest.approx({"1": 0.4, "2": 0.4, "over 2": 0.2})
    assert facts["top_k_mass"] == 0.75
    assert facts["entropy_nats_at_least"] == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(4))
    assert facts["worst_strings"] == [
        {"string": "ab1de", "uncompared_tokens": 2, "teacher": ["ab", "1de"], "student": ["ab1", "de"]}
    ]
    assert facts["worst_documents"][0]["doc_id"] == teacher.doc_id
    # windows of 3 tokens and a prefix: the first holds the whole group of two
    assert facts["windows"] == {"max_length": 4, "windows": 2, "documents_of_several": 1, "groups_cut": 0}
    assert facts["verdict"].startswith("go: --align boundary compares 80%")
    assert "--skip-numerals" in facts["verdict"]


def test_verdicts():
    def facts(own, rows, merged, pairs=10, numerals=0.0, grouped=1.0):
        boundary = {"pairs": pairs, "teacher_rows": rows, "student_positions": own}
        merge = {"pairs": pairs, "teacher_rows": merged, "student_positions": merged}
        modes = {"boundary": boundary, "merge": merge}
        return {"modes": modes, "numerals": numerals, "grouped_bytes": grouped, "same_tokenizer": False}

    assert verdict(facts(0.9, 0.9, 1.0)).startswith("go: ")
    assert verdict(facts(0.2, 0.3, 0.9)).startswith("go with --align merge --loss ce:1,uld:1.5: ")
    assert verdict(facts(0.01, 0.02, 0.9)).startswith("no-go because only 1%")
    assert verdict(facts(0, 0, 0, pairs=0)).startswith("no-go because the two tokenisations share not one boundary")
    assert "only 20% of the bytes" in verdict(facts(0.9, 0.9, 1.0, grouped=0.2))


def test_report_on_a_real_pair_and_on_the_teachers_own_tokenizer(cache_path, gemma_tokenizer, smollm2_tokenizer):
    cache = open_cache(cache_path)
    documents = [document for document in map(cache.__getitem__, range(len(cache))) if len(document.segment)]
    digest = cache.manifest.tokenizer["digest"]
    own = alignment_report(documents, gemma_tokenizer, teacher_digest=digest)
    assert own["same_tokenizer"]
    assert own["modes"]["boundary"]["teacher_rows"] == own["modes"]["merge"]["student_positions"] == 1
    # A completion's first token that began in the prompt is nobody's to predict.
    assert own["one_to_one_bytes"] == own["grouped_bytes"] == pytest.approx(1 - own["bytes_without_teacher_row"])
    assert own["worst_strings"] == []
    facts = alignment_report(documents, smollm2_tokenizer, teacher_digest=digest, max_length=24)
    assert not facts["same_tokenizer"]
    assert 0.7 < facts["one_to_one_bytes"] < facts["grouped_bytes"] < 1  # no BOS: the first token has no row
    assert facts["windows"]["documents_of_several"] > 0
    rows = sum(len(document.segment) for document in documents)
    assert facts["numerals"] == sum(numeral_rows(document).sum() for document in documents) / rows
    for row in facts["worst_strings"]:
        if "\\x" not in "".join(row["teacher"] + row["student"]):  # parts of a character
            assert "".join(row["teacher"]) == "".join(row["student"]) == row["string"]
    with pytest.raises(AlignmentError):
        alignment_report([], smollm2_tokenizer)


def test_the_command(cache_path, smollm2_path, tmp_path, capsys):
    flags = ["align-report", "--cache", str(cache_path), "--student", str(smollm2_path)]
    assert main([*flags, "--html", str(tmp_path / "r" / "report.html")]) == 0
    text = capsys.readouterr().out
    assert "verdict: go" in text
    page = (tmp_path / "r" / "report.html").read_text(encoding="utf8")
    assert "Verdict" in page
    assert "http" not in page.partition("<h2>")[0]
    assert main([*flags, "--json", "--max-documents", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 5

"""The sheet: every figure in its cell, what was not measured said so, text escaped."""

import json

from distill.inference_benchmark import InferenceFigures, InferenceSettings, Spread
from distill.poc_sheet import as_html, as_markdown, sheet_facts, table

SPREAD = Spread(median=1234.5, q1=1000.0, q3=2000.0)
FIGURES = InferenceFigures(
    parameters=134_515_008,
    parameters_without_embeddings=106_203_456,
    weights_bytes=269_060_552,
    peak_bytes=816_308_224,
    dtype="float32",
    bytes_per_token=4.028,
    first_token_ms=SPREAD,
    token_ms=SPREAD,
    prefill_tokens=SPREAD,
    prefill_bytes=SPREAD,
    decode_tokens=SPREAD,
    decode_bytes=SPREAD,
    batch_size=2,
    new_tokens=8,
    repeats=3,
)
MACHINE = {
    "cpu": "Some CPU",
    "threads": 2,
    "gpu": None,
    "system": "Linux x86_64",
    "python": "3.11",
    "torch": "2.13",
    "transformers": "5.19",
}
QUALITY = {
    "teacher": {"bits per byte": 0.9},
    "a|<b>": {"bits per byte": 1.25, "acc": {"value": 0.5, "stderr": 0.01}},
}
FACTS = sheet_facts(QUALITY, {"a|<b>": FIGURES}, InferenceSettings(texts=("ü", "b"), new_tokens=8), MACHINE)


def test_table():
    names, rows = table(FACTS)
    assert names == ["", "teacher", "a|<b>"]
    cells = {label: values for label, *values in rows}
    assert cells["bits per byte"] == ["0.9000", "1.2500"]
    assert cells["acc"] == ["not measured", "0.5000 ± 0.0100"]
    assert cells["parameters"] == ["not measured", "134.5 M"]
    assert cells["parameters without embeddings"][1] == "106.2 M"
    assert cells["weights on disk"][1] == "269 MB"
    assert cells["peak memory"][1] == "816 MB"
    assert cells["time to the first token, ms"][1] == "1,234.5 (1,000.0 to 2,000.0)"
    assert cells["prefill, kB of text/s"][1] == "1.2 (1.0 to 2.0)"
    assert len(rows) == 14
    assert json.loads(json.dumps(FACTS)) == FACTS
    assert FACTS["measured_on"] == {"texts": 2, "text_bytes": 3, "new_tokens": 8, "repeats": 5}


def test_markdown_is_one_table_and_html_escapes():
    lines = as_markdown(FACTS, "Title").splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 14
    assert len({len(row) for row in rows}) == 1
    assert "a\\|<b>" in rows[0]
    page = as_html(FACTS, "<i>")
    assert "<i>" not in page
    assert "a|&lt;b&gt;" in page
    assert "Some CPU, 2 threads, no GPU" in page
    assert page.count("<tr>") == 1 + 14

"""From a teacher to a student by way of a sketch: its bins reach the loss, which is the sum over whole vocabularies."""

import json
from pathlib import Path

import pytest
import torch
from random_teacher import make_random_teacher
from reference_losses import cached_uld, full_uld, mapped
from transformers import AutoModelForCausalLM, AutoTokenizer

from cache_builder.main import main as cache_builder
from distill import CachedDocuments, EpochBatches, align, map_words
from distill.main import main as distill
from storage_specs.rendering import render_all
from storage_specs.sketch import expand_sorted
from storage_specs.windows import cut_windows

STEPS, DOCUMENTS, MAX_LENGTH, SEED = 1, 6, 64, 3
K, K_IDS = 16, 8


@pytest.fixture(scope="module")
def folder(wiki_texts: list[str], smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with the first words of SmolLM2, a student with all of them, and the teacher's cache."""
    folder = tmp_path_factory.mktemp("sketch")
    make_random_teacher(folder / "teacher", smollm2_path, 2048, seed=1)
    make_random_teacher(folder / "student", smollm2_path, seed=2)
    lines = [json.dumps({"text": text[:160]}) + "\n" for text in wiki_texts[:8]]
    (folder / "corpus.jsonl").write_text("".join(lines), encoding="utf8")
    build = [
        "build",
        "--teacher",
        folder / "teacher",
        "--corpus",
        folder / "corpus.jsonl",
        "--output",
        folder / "cache",
    ]
    build += ["--engine", "transformers", "--dtype", "float32", "--profile", "sketch", "--k", K, "--k_ids", K_IDS]
    assert cache_builder([str(word) for word in build]) == 0
    return folder


def test_a_real_sketch_is_learned_from(folder: Path, tmp_path: Path) -> None:
    words = ["train", "--model_name_or_path", folder / "student", "--cache", folder / "cache", "--output_dir", tmp_path]
    words += ["--loss", "ce:1,uld:1.5,mapped:0.5", "--max_length", MAX_LENGTH, "--max_steps", STEPS, "--use_cpu"]
    words += ["--per_device_train_batch_size", DOCUMENTS, "--seed", SEED, "--logging_steps", 1, "--report_to", "none"]
    assert distill([str(word) for word in words]) == 0
    (line,) = [
        line for line in json.loads((tmp_path / "trainer_state.json").read_bytes())["log_history"] if "ce" in line
    ]

    # The first step again, document by document: naive losses in float64 of rows as the cache decodes them.
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    student = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32).eval()
    documents = CachedDocuments(folder / "cache", ids=True)
    manifest = documents.cache.manifest
    assert manifest.codec["profile"] == "sketch"
    word_map = map_words(documents.cache.vocabulary.token_bytes, documents.cache.vocabulary.special_roles, tokenizer)
    chosen = [documents[n] for n in next(iter(EpochBatches([len(documents)], documents=DOCUMENTS, seed=SEED)))]
    rows: dict[str, list[torch.Tensor]] = {"uld": [], "uld_width": [], "mapped": [], "without_bins": []}
    for document, sequence in zip(chosen, render_all(tokenizer, chosen), strict=True):
        for window in cut_windows(sequence, MAX_LENGTH, MAX_LENGTH // 8):
            index_N, row_N = align(document, window)
            with torch.inference_mode():
                logits_NV = student(torch.from_numpy(window.ids)[None]).logits[0, index_N]
            probs_NK, tail_N = (torch.from_numpy(column[row_N]) for column in (document.probs, document.tail_mass))
            whole_NU = expand_sorted(document.probs[row_N], document.tail_bins[row_N], manifest.rank_edges)
            outside_N = 1 - logits_NV.double().softmax(1).topk(K, dim=1).values.sum(1)
            rows["uld"].append(full_uld(logits_NV, torch.from_numpy(whole_NU)))
            rows["uld_width"].append(2 * torch.minimum(tail_N.double(), outside_N))
            words_NI = torch.from_numpy(word_map.words_U[document.token_ids[row_N]])
            rows["mapped"].append(mapped(logits_NV, probs_NK, words_NI))
            rows["without_bins"].append(cached_uld(logits_NV, probs_NK, tail_N))
    expected = {name: torch.cat(found).mean().item() for name, found in rows.items()}
    assert line["uld"] == pytest.approx(expected["uld"], abs=2e-3)  # what the histogram's steps cost
    assert abs(line["uld"] - expected["without_bins"]) > 1e-2
    assert line["mapped"] == pytest.approx(expected["mapped"], rel=1e-4)
    # What is certain without the bins; with them the loss lies within it.
    assert line["uld_width"] == pytest.approx(expected["uld_width"], rel=1e-4)
    assert expected["without_bins"] <= line["uld"] <= expected["without_bins"] + line["uld_width"]
    assert 0 < line["compared_student"] <= 1

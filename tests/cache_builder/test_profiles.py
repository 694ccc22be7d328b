"""`build --profile`: what each profile keeps of a real forward pass, in both stores, against a full softmax in fp64."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny_teacher import VOCABULARY, write_corpus

from cache_builder.build_config import BuildConfig
from cache_builder.builder import build
from storage_specs import open_cache, verify_cache
from storage_specs.errors import ConfigError
from storage_specs.sketch import bin_masses, expand_sorted

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Naïve café: 日本語 😀.", "a b c d e f g h i j k l"]


def config(folder: Path, teacher: Path, **more: object) -> BuildConfig:
    corpus = write_corpus(folder / "corpus.jsonl", TEXTS)
    return BuildConfig(
        teacher=str(teacher),
        corpus=str(corpus),
        output=folder / "cache",
        engine="transformers",
        dtype="float32",
        **more,
    )


def sorted_distributions(teacher: Path, text: str) -> np.ndarray:
    """(T, V) float64, descending: what the teacher expects after every token of the text but its last."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        probs_TV = model(input_ids=ids).logits[0].double().softmax(-1).numpy()
    return -np.sort(-probs_TV, axis=1)


@pytest.mark.parametrize("store", ["zarr", "arrow"])
@pytest.mark.parametrize(
    ("profile", "k", "bound"), [("exact", 64, 1e-6), ("half", 64, 2e-3), ("compact", 64, 4e-3), ("sketch", 16, 9e-3)]
)
def test_every_profile_keeps_what_it_promises(
    tmp_path: Path, teacher: Path, store: str, profile: str, k: int, bound: float
) -> None:
    report = build(config(tmp_path, teacher, profile=profile, store=store))
    codec = report.manifest.codec
    assert codec["profile"] == profile
    assert report.manifest.k == k
    assert codec["max_l1_error"] <= codec["bound_l1_error"] + 1e-6 <= bound + 1e-6
    assert codec["mean_l1_error"] <= codec["p99_l1_error"] <= codec["max_l1_error"]
    assert verify_cache(tmp_path / "cache").ok
    for text, document in zip(TEXTS, open_cache(tmp_path / "cache"), strict=True):
        whole_TV = sorted_distributions(teacher, text)[: len(document.segment)]
        tail_T = whole_TV[:, k:].sum(axis=1)
        error_T = np.abs(document.probs - whole_TV[:, :k]).sum(axis=1)
        if profile == "sketch":
            edges = report.manifest.rank_edges
            assert (edges[0], edges[-1], len(edges)) == (16, VOCABULARY, 21)
            error_T += np.abs(document.tail_bins - bin_masses(whole_TV, edges)).sum(axis=1)
            found_TV = expand_sorted(document.probs, document.tail_bins, edges)
            assert found_TV.shape == whole_TV.shape
            np.testing.assert_allclose(found_TV.sum(axis=1), 1, atol=1e-5)
        else:
            assert document.tail_bins is None
            error_T += np.abs(document.tail_mass - tail_T)
        assert error_T.max() <= codec["max_l1_error"] + 2e-5  # and the engine's float32
        np.testing.assert_allclose(document.tail_mass, tail_T, atol=bound)


def test_profiles_that_cannot_be_are_refused(tmp_path: Path, teacher: Path) -> None:
    for more, message in (
        ({"profile": "zip"}, "profile is 'zip'"),
        ({"tail_bins": 8}, "tail_bins are kept by the profile sketch only"),
        ({"profile": "sketch", "tail_bins": 0}, "tail_bins is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(tmp_path, teacher, **more)
    with pytest.raises(ConfigError, match="sketch of 20 bins"):
        build(config(tmp_path, teacher, profile="sketch", k=VOCABULARY))
    assert not (tmp_path / "cache").exists()

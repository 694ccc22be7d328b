"""What all codecs share: how they are found, what they refuse."""

from dataclasses import replace

import numpy as np
import pytest
from codec_rows import sketch_rows, teacher_rows

from storage_specs.codecs import PROFILES, RowValues, codec_of, default_k, default_parameters
from storage_specs.errors import ConfigError

GOOD = teacher_rows(6, 8)
WHOLE = sketch_rows(6, 8, vocab_size=500)
CODECS = {
    profile: codec_of(profile, k=8, parameters=default_parameters(profile, k=8, vocab_size=500)) for profile in PROFILES
}


def with_bins(values: RowValues) -> RowValues:
    return replace(values, tail_bins=WHOLE.tail_bins)


def changed(name: str, place: object, value: float) -> object:
    array = getattr(GOOD, name).copy()
    array[place] = value
    return replace(GOOD, **{name: array})


BAD = {
    "float64": (replace(GOOD, probs=GOOD.probs.astype(np.float64)), r"probs must be float32 \(6, 8\), found float64"),
    "a list": (replace(GOOD, tail_mass=[0.0] * 6), "tail_mass must be float32"),
    "another k": (replace(GOOD, probs=GOOD.probs[:, :7]), "probs must be float32"),
    "rows": (replace(GOOD, tail_mass=GOOD.tail_mass[1:]), "tail_mass must be float32"),
    "nan": (changed("probs", (0, 7), np.nan), "not finite"),
    "infinite tail": (changed("tail_mass", 0, np.inf), "not finite"),
    "negative": (changed("probs", (0, 7), -1e-6), "negative"),
    "negative tail": (changed("tail_mass", 0, -1e-6), "negative"),
    "unsorted": (replace(GOOD, probs=GOOD.probs[:, ::-1].copy()), "not sorted"),
    "too much": (changed("tail_mass", 0, 1.5), "sum to"),
    "logits": (replace(GOOD, probs=GOOD.probs * 30), "sum to"),
}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_distribution_is_refused(profile: str, name: str) -> None:
    values, words = BAD[name]
    if profile == "sketch":
        values = with_bins(values)
    with pytest.raises(ValueError, match=words):
        CODECS[profile].encode(values)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_codec_is_found_by_what_it_says_of_itself(profile: str) -> None:
    codec = CODECS[profile]
    assert codec_of(codec.profile, k=codec.k, parameters=codec.parameters) == codec


@pytest.mark.parametrize("profile", PROFILES)
def test_tail_bins_belong_to_the_sketch_alone(profile: str) -> None:
    values = replace(WHOLE, tail_bins=None) if profile == "sketch" else with_bins(GOOD)
    with pytest.raises(ValueError, match="tail_bins"):
        CODECS[profile].encode(values)


def test_defaults() -> None:
    assert {profile: default_k(profile) for profile in PROFILES} == {
        "exact": 64,
        "half": 64,
        "compact": 64,
        "sketch": 16,
    }
    edges = default_parameters("sketch", k=16, vocab_size=262_144)["rank_edges"]
    assert (len(edges), edges[0], edges[-1]) == (21, 16, 262_144)
    with pytest.raises(ConfigError, match="sketch of 20 bins"):
        default_parameters("sketch", k=16, vocab_size=16)


def test_unknown_profiles_and_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match="'halves' is none of exact, half"):
        codec_of("halves", k=8)
    with pytest.raises(ConfigError, match=r"codec profile half: .*'step_bits'"):
        codec_of("half", k=8, parameters={"step_bits": 13})
    with pytest.raises(ConfigError, match=r"codec profile sketch: .*'rank_edges'"):
        codec_of("sketch", k=8)

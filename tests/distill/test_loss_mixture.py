"""`--loss`: what it says, and what it refuses."""

import pytest
from training import config

from distill import DistillationConfig
from distill.loss_mixture import LOSSES, LossMixture
from storage_specs.errors import ConfigError


def test_a_mixture_is_what_it_says():
    mixture = LossMixture.parse(" uld : 1.5, ce:1,likelihood:0 ")
    assert str(mixture) == "ce:1,uld:1.5"
    assert mixture["uld"] == 1.5
    assert mixture["mapped"] == 0
    assert mixture.of_teacher == ("uld",)
    assert not mixture.needs_ids
    assert LossMixture.parse(str(mixture)) == mixture
    with pytest.raises(AttributeError):
        mixture.weights = ()


@pytest.mark.parametrize("name", LOSSES)
def test_what_each_loss_needs(name):
    mixture = LossMixture.parse(f"{name}:2")
    assert mixture.names == (name,)
    assert mixture.of_teacher == (() if name == "ce" else (name,))
    assert mixture.needs_ids == (name in ("mapped", "hybrid", "kl", "jsd"))
    assert mixture.needs_same_tokenizer == (name in ("kl", "jsd"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("maped:1", "did you mean 'mapped'"),
        ("ce", "ce:WEIGHT"),
        ("ce:1,uld:-1", "uld:-1"),
        ("ce:nan", "finite"),
        ("ce:1,uld:inf", "finite"),
        ("ce:one", "finite"),
        ("ce:1,ce:2", "twice"),
        ("ce:0,uld:0", "nothing would be learned"),
        ("", "unknown loss ''"),
        ("ce:1;uld:1.5", "must be ce:WEIGHT"),
        ("ce:1,kl:1,mapped:1", "leave out"),
        ("jsd:1,hybrid:1", "leave out"),
    ],
)
def test_what_is_refused(text, says):
    with pytest.raises(ConfigError, match=says):
        LossMixture.parse(text)


def test_the_default_is_what_paid_and_spelling_makes_no_other_run(tmp_path):
    assert DistillationConfig(output_dir=str(tmp_path), use_cpu=True).loss == "ce:1,mapped:1"
    assert config(tmp_path, loss="uld:1.50,ce:1.0").loss == "ce:1,uld:1.5"
    for name in ("mapped", "hybrid", "kl", "jsd"):
        with pytest.raises(ConfigError, match=f"with {name}"):
            config(tmp_path, align="merge", loss=f"ce:1,{name}:1")
    assert config(tmp_path, align="merge", loss="uld:1,likelihood:1").mixture["likelihood"] == 1

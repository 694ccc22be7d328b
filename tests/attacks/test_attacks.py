"""Every malicious cache of the gallery is refused, by the right error, fast, and in little memory."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "storage_specs"))

from gallery import ATTACKS, Attack
from measuring import Refusal, measure
from trials import good_caches, problem_of, refusals


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Attack, Refusal]:
    return refusals(ATTACKS, tmp_path_factory.mktemp("gallery"))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_the_attack_is_refused(found: dict[Attack, Refusal], attack: Attack) -> None:
    assert attack.naive, "its docstring says what a naive reader would do"
    assert problem_of(attack, found[attack]) is None


def test_good_caches_are_not_refused(tmp_path: Path) -> None:
    good = list(good_caches(tmp_path).values())
    assert [refusal.errors for refusal in measure(good, good)] == [{}, {}]


def test_the_gallery_meets_both_stores() -> None:
    assert len(ATTACKS) >= 12
    assert {attack.store for attack in ATTACKS} == {"zarr", "arrow"}

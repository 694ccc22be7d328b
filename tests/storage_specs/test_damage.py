"""Damage of every kind, in both stores and both reading modes: an error or the right values, never others.

The table of 10,000 flips beside plain formats is `scripts/flip_bits.py`'s; this is its small edition.
"""

import flip_bits
import pytest
from damaged_caches import DETECTED, ONE_BY_ONE, SILENT, UNAFFECTED, UNTYPED, WHOLE, OurCache

FLIPS = 150


@pytest.fixture(scope="module", params=["zarr", "arrow"])
def builds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict, dict]:
    return request.param, *flip_bits.our_caches(tmp_path_factory.mktemp("builds"), request.param, "compact", words=700)


@pytest.mark.parametrize("mode", [WHOLE, ONE_BY_ONE])
def test_every_flipped_bit_is_detected(builds: tuple[str, dict, dict], mode: str) -> None:
    store, files, _ = builds
    subject = OurCache(store, mode, files)
    regions = {region for _, region, _ in flip_bits.flips(subject, FLIPS, seed=0)}
    assert {"manifest.json", "plan.json", "shards.parquet", "vocabulary.parquet", "commit record"} <= regions
    assert ("index" if store == "zarr" else "footer") in regions
    counted = flip_bits.tried(subject, flip_bits.flips(subject, FLIPS, seed=0), "")
    group = files["shards/000000.zarr/zarr.json"] if store == "zarr" else b""
    harmless = {key: times for key, times in counted.items() if key[2] != DETECTED}
    assert not any(key[2] in (SILENT, UNTYPED) for key in harmless)
    assert set(harmless) <= ({("bit flip", "zarr.json", UNAFFECTED)} if mode == ONE_BY_ONE and group else set())


@pytest.mark.parametrize("mode", [WHOLE, ONE_BY_ONE])
def test_objects_cut_exchanged_lost_and_stale(builds: tuple[str, dict, dict], mode: str) -> None:
    store, files, stale = builds
    subject = OurCache(store, mode, files)
    assert subject.outcome(files, set(files)) == UNAFFECTED
    counted = flip_bits.tried(subject, flip_bits.other_damage(subject, stale, seed=0), "")
    assert {kind for kind, _, _ in counted} >= {"deleted", "truncated", "of another build", "another object, same size"}
    assert not any(outcome in (SILENT, UNTYPED) for _, _, outcome in counted)
    if mode == WHOLE:
        assert all(outcome == DETECTED for _, _, outcome in counted)

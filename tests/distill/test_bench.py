"""`distill bench reader`: figures of a small cache, as text and as JSON; and the formats that it is compared with."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "storage_specs"))

from reader_baselines import PackedIds, ParquetLists, RawNumpy, Rows
from small_caches import STORES, some_documents, some_settings, write_cache

from distill.main import main
from distill.reader_benchmark import Spread
from storage_specs import open_cache
from storage_specs.errors import ConfigError, NotACacheError


@pytest.mark.parametrize("store", STORES)
def test_figures_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str], store: str) -> None:
    write_cache(tmp_path, some_documents(7), some_settings(store))
    assert main(["bench", "reader", str(tmp_path), "--json", "--repeats", "2", "--documents", "3"]) == 0
    figures = json.loads(capsys.readouterr().out)
    cache = open_cache(tmp_path)
    assert (figures["store"], figures["profile"], figures["k"], figures["k_ids"]) == (store, "half", 8, 4)
    assert figures["rows"] == cache.manifest.counts["rows"]
    assert figures["stored_bytes"] == sum(stored.size for shard in range(3) for stored in cache.table.objects[shard])
    for name in ("rows_per_second", "gigabytes_per_second", "cold_ms", "warm_ms"):
        assert 0 < figures[name]["p10"] <= figures[name]["median"] <= figures[name]["p90"], name
    assert figures["peak_mib"] > 10


def test_figures_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cache(tmp_path, some_documents(7), some_settings("zarr"))
    assert main(["bench", "reader", str(tmp_path), "--no-ids", "--repeats", "1", "--documents", "1"]) == 0
    printed = capsys.readouterr().out
    assert "zarr, half, k 8, ids of 0 ranks" in printed
    for line in ("million rows/s per core", "GB/s per core", "one document, cold", "4 shards kept decoded"):
        assert line in printed


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(NotACacheError):
        main(["bench", "reader", str(tmp_path)])
    write_cache(tmp_path, [some_documents(2)[1]], some_settings())
    with pytest.raises(ConfigError, match="no rows to read"):
        main(["bench", "reader", str(tmp_path)])
    with pytest.raises(ConfigError, match="invalid choice"):
        main(["bench", "writer", str(tmp_path)])


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0]).median == 2.0
    assert Spread.of([float(number) for number in range(11)]) == Spread(median=5.0, p10=1.0, p90=9.0)


@pytest.mark.parametrize("baseline", [RawNumpy(), ParquetLists(), ParquetLists(with_ids=False), PackedIds()])
def test_other_formats_give_their_rows_back(tmp_path: Path, baseline: RawNumpy) -> None:
    random = np.random.default_rng(0)
    probs = -np.sort(-random.dirichlet(np.full(64, 0.1), 90), axis=1).astype(np.float32)
    rows = Rows(
        probs=probs,
        tail_mass=np.zeros(90, np.float32),
        ids=random.integers(0, 262_144, (90, 64)),
        document_rows=np.array([40, 0, 50]),
    )
    baseline.write(rows, tmp_path)
    found = np.concatenate(list(baseline.read(tmp_path)))
    assert found.shape == probs.shape
    assert np.abs(found - probs).max() < 1e-3

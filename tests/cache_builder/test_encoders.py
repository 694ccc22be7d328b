"""Processes that encode beside the engine's: the same bytes, the errors as raised, and what being killed leaves."""

import os
import pickle
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cache_builder import parcels
from cache_builder.encoders import ShardEncoders
from cache_builder.parcels import parcel
from storage_specs.document import CachedDocument, text_document
from storage_specs.errors import EngineError, InvalidDocumentError
from storage_specs.settings import CacheSettings
from storage_specs.writer import encoded_shard

SETTINGS = CacheSettings(
    teacher={}, tokenizer={}, chat_template=None, engine={}, windows={}, k=2, k_ids=0, vocab_size=9, profile="half"
)


def document_of(text: str) -> CachedDocument:
    """A row per letter."""
    row_T = np.arange(len(text))
    half_T = np.full(len(text), 0.5, np.float32)
    return CachedDocument(
        **vars(text_document(text)), segment=0 * row_T, byte_start=row_T, byte_end=row_T + 1, is_end=row_T < 0,
        gold_logprob=-half_T, tail_mass=0 * half_T, probs=np.stack([half_T, half_T], axis=1),
    )  # fmt: skip


DOCUMENTS = [document_of(text) for text in ("the", "river", "Aare")]
IDS = tuple(document.doc_id for document in DOCUMENTS)
ORPHANS = """
import os, sys, time
from cache_builder.encoders import ShardEncoders
from test_encoders import DOCUMENTS, IDS, SETTINGS
if __name__ == "__main__":
    encoders = ShardEncoders(SETTINGS, 1)
    encoders(0, DOCUMENTS, SETTINGS, IDS)
    print(*encoders.pool._processes, flush=True)
    time.sleep(600)
"""


def test_a_shard_has_the_same_bytes_whichever_process_encodes_it() -> None:
    encoders = ShardEncoders(SETTINGS, 1)
    try:
        assert encoders(7, DOCUMENTS, SETTINGS, IDS) == encoded_shard(7, DOCUMENTS, SETTINGS, IDS)
        with pytest.raises(InvalidDocumentError, match="shard 7: its documents are not those that the plan names"):
            encoders(7, DOCUMENTS, SETTINGS, IDS[1:])
        (process,) = encoders.pool._processes
        os.kill(process, signal.SIGKILL)
        with pytest.raises(EngineError, match="shard 8: a process that encodes rows died"):
            encoders(8, DOCUMENTS, SETTINGS, IDS)
    finally:
        encoders.close()


def memory_files() -> int:
    """How many of our files in memory this process has open."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that listed them
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return sum(parcels.NAME in link for link in links)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_parcel_is_what_was_sent_and_whoever_opens_it_may_change_it(in_memory: bool) -> None:
    sent = {"a": np.arange(9, dtype=np.int8), "empty": np.zeros((0, 3)), "c": np.eye(3), "text": "Aare", "none": None}
    with parcel(sent, in_memory) as packed:
        assert (packed.path is not None) == in_memory
        first, second = (pickle.loads(pickle.dumps(packed)).open() for _ in range(2))
    first["c"][0, 0] = 7
    for name in sent:
        np.testing.assert_array_equal(second[name], sent[name])
        assert getattr(second[name], "dtype", None) == getattr(sent[name], "dtype", None)
    assert second["c"].ctypes.data % 64 == 0 or not in_memory
    with parcel([np.zeros(0)], in_memory) as packed:
        assert packed.open()[0].shape == (0,)
    del first, second
    assert memory_files() == 0


@pytest.mark.parametrize("missing", [AttributeError, PermissionError])
def test_without_files_in_memory_a_parcel_is_a_pickle(
    missing: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def memfd_create(name: str) -> int:
        raise missing(name)

    monkeypatch.setattr(parcels, "os", SimpleNamespace(memfd_create=memfd_create))
    with parcel(np.arange(3)) as packed:
        assert packed.path is None
        np.testing.assert_array_equal(packed.open(), np.arange(3))


def test_without_room_in_memory_a_parcel_is_a_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    full = partial(open, "/dev/full", "wb")
    monkeypatch.setattr(parcels, "open", lambda *_, **__: full(), raising=False)
    with parcel(np.arange(3)) as packed:
        assert packed.path is None
        np.testing.assert_array_equal(packed.open(), np.arange(3))
    assert memory_files() == 0


def test_rows_travel_in_the_pickle_where_processes_cannot_read_each_others_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = SimpleNamespace(getpid=lambda: 2**22 + 1, memfd_create=os.memfd_create, close=os.close)
    monkeypatch.setattr(parcels, "os", elsewhere)  # that is above any process's number
    encoders = ShardEncoders(SETTINGS, 1)
    try:
        for _ in range(2):
            assert encoders(7, DOCUMENTS, SETTINGS, IDS) == encoded_shard(7, DOCUMENTS, SETTINGS, IDS)
            assert not encoders.in_memory
    finally:
        encoders.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rows go to the encoders by a pipe, slower: an encoder cannot read /proc/4194305/fd/")
    assert memory_files() == 0


def test_encoders_do_not_outlive_a_build_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "build.py").write_text(ORPHANS)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "build.py"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    encoder = int(parent.stdout.readline())
    try:
        parent.kill()
        parent.communicate(timeout=120)  # the encoder has its output open, too: this ends with both
    except subprocess.TimeoutExpired:
        os.kill(encoder, signal.SIGKILL)
        raise

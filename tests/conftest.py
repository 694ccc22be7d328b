"""Real models and text for every test that asks, made once under TEACH_ONCE_HOME (scripts/demo_assets.py)."""

import os

# Before anything reads it, for the tests of this folder and the processes that they start (vLLM chooses for its own):
# bytes are compared between them, and a forward pass with another number of threads rounds otherwise.
os.environ["OMP_NUM_THREADS"] = "1"

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from object_stores import S3, moto_server, new_bucket

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import demo_assets

# The same examples in every run; scripts/nightly_spans.py looks for new ones.
settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("same")

# Started in a shell's background a process ignores Ctrl-C, and so would all that the tests start and then interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    """Folder of Gemma-3-270M base (teacher; SentencePiece BPE, 262,144 words, needs BOS)."""
    return demo_assets.gemma_path()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Folder of SmolLM2-135M-Instruct (student; byte-level BPE, 49,152 words, no BOS, chat template)."""
    return demo_assets.smollm2_path()


@pytest.fixture(scope="session")
def wiki_texts() -> list[str]:
    """The first 64 Wikipedia passages of at least 400 bytes."""
    texts = []
    with demo_assets.wikipedia_path().open(encoding="utf8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            if len(text.encode()) >= 400:
                texts.append(text)
            if len(texts) == 64:
                break
    return texts


@pytest.fixture(scope="session")
def moto_address() -> Iterator[tuple[str, int]]:
    """Host and port of a real S3 server on loopback, moto's."""
    with moto_server() as address:
        yield address


@pytest.fixture
def s3(moto_address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """An empty bucket behind a proxy that can break answers; the environment points there."""
    with new_bucket(moto_address) as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        yield bucket

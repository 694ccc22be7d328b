"""Real models and text for every test that asks, made once under TEACH_ONCE_HOME (scripts/demo_assets.py)."""

import json
import logging
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from faulty_proxy import FaultyProxy

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import demo_assets


class S3(NamedTuple):
    """A bucket's URL, and the proxy between it and the code under test."""

    url: str
    proxy: FaultyProxy


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
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def s3(moto_address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """An empty bucket behind a proxy that can break answers; the environment points there."""
    proxy = FaultyProxy(moto_address)
    bucket = f"bucket-{uuid.uuid4().hex}"
    for name, value in {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    with urllib.request.urlopen(urllib.request.Request(f"{proxy.url}/{bucket}", method="PUT")) as answer:
        assert answer.status == 200
    proxy.requests.clear()
    yield S3(f"s3://{bucket}", proxy)
    proxy.stop()

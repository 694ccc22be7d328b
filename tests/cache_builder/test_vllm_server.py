"""The server engine against vLLM's own server on loopback (CPU build, SmolLM2 in float32; about a minute).

What comes back is held against the transformers engine: the same documents, coordinates and ids, values within a
tolerance. Greedy, because vLLM's and our random numbers differ.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_builder.build_config import BuildConfig
from cache_builder.builder import build
from storage_specs.errors import EngineError
from storage_specs.reader import Cache, open_cache
from storage_specs.verification import verify_cache

K = 16
# what float16 storage and two implementations of the same float32 model may differ by
TOLERANCE = {"rtol": 2**-9, "atol": 1e-4}
ENVIRONMENT = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
PATIENCE = 300


def free_port() -> int:
    """Of those that the system gives nobody who asks for any: what other tests start meanwhile gets none of them."""
    for port in random.Random(os.getpid()).sample(range(20_000, 30_000), 1000):
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


@pytest.fixture(scope="module")
def base_url(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    flags = {"model": smollm2_path, "served-model-name": "smol", "host": "127.0.0.1", "port": port, "dtype": "float32"}
    flags |= {"max-model-len": 256, "max-logprobs": K, "max-num-seqs": 8}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    with log.open("w") as output:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + PATIENCE
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def built(config: BuildConfig) -> Cache:
    build(config)
    assert verify_cache(config.output).ok
    return open_cache(config.output)


def assert_same(server: Cache, local: Cache, with_ids: bool) -> None:
    """Without ids vLLM gives a character's bytes to the last of its tokens, the others none."""
    assert len(server) == len(local)
    for ours, theirs in zip(server, local, strict=True):
        assert (ours.kind, ours.text, ours.messages) == (theirs.kind, theirs.text, theirs.messages)
        for name in ("segment", "is_end"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        for name in ("byte_start", "byte_end"):
            places = getattr(theirs, name).tolist()
            expected = places if with_ids else [character_start(theirs.text.encode(), place) for place in places]
            assert getattr(ours, name).tolist() == expected
        np.testing.assert_allclose(ours.probs, theirs.probs, **TOLERANCE)
        np.testing.assert_allclose(ours.gold_logprob, theirs.gold_logprob, atol=2e-3)
        np.testing.assert_allclose(ours.tail_mass, theirs.tail_mass, atol=K * 2**-11)
        if with_ids:
            assert (ours.token_ids == theirs.token_ids).mean() > 0.99  # near ties may change places


def character_start(data: bytes, place: int) -> int:
    while place < len(data) and data[place] & 0xC0 == 0x80:
        place -= 1
    return place


def common(tmp_path: Path, smollm2_path: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, records)))
    values = {"corpus": str(tmp_path / "corpus.jsonl"), "k": K, "profile": "exact", "max_model_len": 128}
    return values | {"documents_per_shard": 2}


def test_scoring(base_url: str, tmp_path: Path, smollm2_path: Path) -> None:
    texts = ["The river Aare flows through Bern.\n日本語, 😀!", "a", "Water boils at 100 °C at sea level. " * 12]
    values = common(tmp_path, smollm2_path, [{"text": text} for text in texts])
    local = built(
        BuildConfig(
            **values, teacher=str(smollm2_path), dtype="float32", engine="transformers", output=tmp_path / "local"
        )
    )
    endpoint = {"engine": "server", "base_url": base_url, "tokenizer": str(smollm2_path)}
    server = built(BuildConfig(**values, **endpoint, teacher="smol", output=tmp_path / "server"))
    assert server.manifest.k_ids == K
    assert_same(server, local, with_ids=True)
    with pytest.raises(EngineError, match=r"max_logprobs|Requested prompt logprobs"):
        build(BuildConfig(**values | {"k": K + 1}, **endpoint, teacher="smol", output=tmp_path / "more"))
    with pytest.raises(EngineError, match="status 404"):
        build(BuildConfig(**values, **endpoint, teacher="no-such-model", output=tmp_path / "none"))


@pytest.mark.parametrize("k_ids", [0, 4], ids=["black-box", "ids"])
def test_generating(base_url: str, tmp_path: Path, smollm2_path: Path, k_ids: int) -> None:
    """As a black box chats are rendered by the server and bytes come back; with ids both are our own business."""
    records = [
        {"messages": [{"role": "user", "content": "What is 2 + 2? Answer in one word."}]},
        {"messages": [{"role": "user", "content": "Write an emoji and the word water in Japanese."}]},
        {"prompt": "The capital of France is"},
    ]
    values = common(tmp_path, smollm2_path, records)
    values |= {"mode": "generate", "temperature": 0.0, "max_tokens": 24, "stop": (".",), "k_ids": k_ids}
    local = built(
        BuildConfig(
            **values, teacher=str(smollm2_path), dtype="float32", engine="transformers", output=tmp_path / "local"
        )
    )
    endpoint: dict[str, Any] = {"engine": "server", "base_url": base_url}
    endpoint |= {"tokenizer": str(smollm2_path)} if k_ids else {"vocab_size": 49152}
    server = built(BuildConfig(**values, **endpoint, teacher="smol", output=tmp_path / "server"))
    assert_same(server, local, with_ids=k_ids > 0)
    assert [item.metadata["generation"] for item in server] == [item.metadata["generation"] for item in local]
    assert sum(len(item.segment) for item in server) > 10

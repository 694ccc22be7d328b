"""Real models and text for every test that asks, made once under TEACH_ONCE_HOME (scripts/demo_assets.py)."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import demo_assets


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

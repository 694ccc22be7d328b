"""The tiny teacher of all tests of this room."""

from pathlib import Path

import pytest
from tiny_teacher import make_tiny_teacher


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Path:
    """Its folder; do not write into it."""
    return make_tiny_teacher(tmp_path_factory.mktemp("teachers") / "tiny", smollm2_path)

"""Which model a folder holds: digests of what decides its outputs, so that other weights under the same path show.

One rule for both rooms: a manifest names its teacher by `weights_digest`, a training run its student by `model_digest`.
"""

import hashlib
import re
from pathlib import Path

from storage_specs.document import canonical_json

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")  # the first that matches


def weights_digest(folder: Path) -> str | None:
    """sha256 over the weight files' names and sha256, sorted by name; None where there are none. Raises OSError."""
    files = next(filter(None, (sorted(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS)), [])
    if not files:
        return None
    return hashlib.sha256(canonical_json([[file.name, file_digest(file)] for file in files])).hexdigest()


def model_digest(folder: Path) -> str:
    """sha256 over config.json's and the weights' digests. Raises OSError where a file cannot be read."""
    return hashlib.sha256(canonical_json([file_digest(folder / "config.json"), weights_digest(folder)])).hexdigest()


def file_digest(file: Path) -> str:
    """sha256 of a file; the hub's download cache already keeps large files under that name."""
    blob = file.resolve()
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()

"""Which model a folder holds: a digest of what decides its outputs, so that other weights under the same path show."""

import hashlib
import re
from pathlib import Path

from storage_specs.document import canonical_json

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")  # the first that matches


def model_digest(folder: Path) -> str:
    """sha256 over the names and sha256 of config.json and the weight files. Raises OSError where one cannot be read."""
    weights = next(filter(None, (sorted(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS)), [])
    files = [folder / "config.json", *weights]
    return hashlib.sha256(canonical_json([[file.name, file_digest(file)] for file in files])).hexdigest()


def file_digest(file: Path) -> str:
    """sha256 of a file; the hub's download cache already keeps large files under that name."""
    blob = file.resolve()
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()

"""Digests of model folders: by content, whatever the path, and without reading what the hub named by its digest."""

import hashlib

from storage_specs.document import canonical_json
from storage_specs.model_identity import file_digest, model_digest, weights_digest


def test_digests_follow_content(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert weights_digest(tmp_path) is None
    (tmp_path / "pytorch_model.bin").write_bytes(b"old")
    only_bin = weights_digest(tmp_path)
    for name in ("model-00002.safetensors", "model-00001.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    names = ("model-00001.safetensors", "model-00002.safetensors")
    files = [[name, hashlib.sha256(name.encode()).hexdigest()] for name in names]
    assert weights_digest(tmp_path) == hashlib.sha256(canonical_json(files)).hexdigest() != only_bin
    before = model_digest(tmp_path)
    (tmp_path / "config.json").write_text('{"rope_theta": 5}')
    assert model_digest(tmp_path) != before
    assert weights_digest(tmp_path) == hashlib.sha256(canonical_json(files)).hexdigest()


def test_the_hubs_own_names_are_taken(tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / ("0" * 64)).write_bytes(b"not read")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blobs / ("0" * 64))
    assert file_digest(link) == "0" * 64

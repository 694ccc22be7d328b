"""One array of the Zarr store: written by zarr, read chunk by chunk from verified bytes, each chunk's size known first.

Inner chunks hold whole rows and are coded [transpose] -> bytes (little endian) -> blosc (zstd) -> crc32c; the outer
chunk, one object, is the inner ones and an index of (offset, size) pairs, uint64, with a crc32c of its own. zarr's own
reader would take any codec and any chunk a file claims; this one takes these only, and bounds what it allocates.

Legend: N rows, C inner chunks, L rows of one inner chunk.
"""

import math
from typing import Any

import numpy as np

from storage_specs.checksum import crc32c
from storage_specs.codecs.base import ArraySpec
from storage_specs.shard_bytes import EncodedObject, ShardBytes
from storage_specs.strict_json import strict_json

GROUP = b'{"attributes":{},"node_type":"group","zarr_format":3}'
MAX_METADATA_BYTES = 1 << 16
MAX_CHUNK_BYTES = 1 << 26  # of one inner chunk, decoded
BYTES_PER_CHUNK = 1 << 20  # at most, decoded: wide rows (k near the vocabulary) share a chunk with fewer others
_BLOSC_HEADER = 16
_INDEX_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def encode(path: str, values: np.ndarray, spec: ArraySpec, longest: int) -> dict[str, EncodedObject]:
    """{object name: its bytes and parts} of an array, with at most `longest` whole rows per inner chunk."""
    import zarr

    row_bytes = values.itemsize * math.prod(values.shape[1:])
    longest = max(1, min(longest, BYTES_PER_CHUNK // max(1, row_bytes)))
    chunks = max(1, -(-len(values) // longest))
    inner = max(1, -(-len(values) // chunks))  # as even as can be: the last one is padded
    contents: dict[str, Any] = {}
    array = zarr.create_array(
        zarr.storage.MemoryStore(contents),
        shape=values.shape,
        dtype=values.dtype,
        chunks=(inner, *values.shape[1:]),
        shards=(inner * chunks, *values.shape[1:]),
        fill_value=0,
        dimension_names=_dimensions(spec),
        config={"write_empty_chunks": True},
        **_codecs(spec, inner),
    )
    if values.size:
        array[...] = values
    objects = {}
    for key, buffer in sorted(contents.items()):
        data = buffer.to_bytes()
        objects[f"{path}/{key}"] = EncodedObject(data, _part_sizes(data, chunks) if key.startswith("c/") else None)
    return objects


def length_of(source: ShardBytes, path: str) -> int:
    """The length of a one-dimensional array, as its metadata claim it."""
    shape = _metadata(source, path).get("shape")
    if not isinstance(shape, list) or len(shape) != 1 or type(shape[0]) is not int or shape[0] < 0:
        raise ValueError(f"array {path} has the shape {shape!r:.100}")
    return shape[0]


def decode(source: ShardBytes, path: str, spec: ArraySpec, rows: int, start: int, stop: int) -> np.ndarray:
    """Rows `start` to `stop` of an array that must have `rows` of them and be as `spec` says. Raises ValueError.

    A rank-major array comes back as the transposed view of a C-contiguous one.
    """
    shape = spec.shape(rows)
    inner, chunks = _layout(_metadata(source, path), spec, shape, path)
    width = 1 if spec.width is None else spec.width
    out = np.empty((width, stop - start) if spec.rank_major else (stop - start, width), spec.dtype)
    if out.size:
        name = f"{path}/c/0" + ("" if spec.width is None else "/0")
        if name not in source.names:
            raise ValueError(f"array {path} has no chunk, and would read as zeros")
        index_C2 = _index(source, name, chunks)
        for chunk in range(start // inner, -(-stop // inner)):
            block = _chunk(source, name, index_C2[chunk], inner * width, spec.dtype)
            first, last = max(start, chunk * inner), min(stop, (chunk + 1) * inner)
            inside, outside = slice(first - chunk * inner, last - chunk * inner), slice(first - start, last - start)
            if spec.rank_major:
                out[:, outside] = block.reshape(width, inner)[:, inside]
            else:
                out[outside] = block.reshape(inner, width)[inside]
    if spec.rank_major:
        return out.T
    return out if spec.width is not None else out[:, 0]


def _part_sizes(data: bytes, chunks: int) -> list[int]:
    """The sizes of an outer chunk's inner chunks, in their order in it, and of its index."""
    index_C2 = np.frombuffer(data[-16 * chunks - 4 : -4], "<u8").reshape(-1, 2)
    return [*index_C2[np.argsort(index_C2[:, 0]), 1].tolist(), 16 * chunks + 4]


def _codecs(spec: ArraySpec, inner: int) -> dict[str, Any]:
    from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, TransposeCodec

    itemsize = spec.dtype.itemsize
    blosc = BloscCodec(
        cname="zstd",
        clevel=8,  # compact: 0.06 % larger than 9, 0.6 % smaller than 7, and a third of the time that 9 takes
        shuffle=spec.shuffle,
        typesize=itemsize,
        blocksize=spec.block_columns * inner * itemsize if spec.rank_major else 0,
    )
    return {
        "filters": [TransposeCodec(order=(1, 0))] if spec.rank_major else [],
        "serializer": BytesCodec(),
        "compressors": [blosc, Crc32cCodec()],
    }


def _dimensions(spec: ArraySpec) -> tuple[str, ...]:
    return ("row",) if spec.width is None else ("row", "rank")


def _metadata(source: ShardBytes, path: str) -> dict[str, Any]:
    size = source.size(f"{path}/zarr.json")
    if size > MAX_METADATA_BYTES:
        raise ValueError(f"{path}/zarr.json has {size} bytes, above the limit of {MAX_METADATA_BYTES}")
    data = source.read(f"{path}/zarr.json")
    metadata = strict_json(bytes(data))
    if not isinstance(metadata, dict) or (metadata.get("zarr_format"), metadata.get("node_type")) != (3, "array"):
        raise ValueError(f"{path} is no Zarr v3 array")
    return metadata


def _layout(metadata: dict[str, Any], spec: ArraySpec, shape: tuple[int, ...], path: str) -> tuple[int, int]:
    """(rows of an inner chunk, inner chunks), where everything is as `spec` says."""
    found = (metadata.get("data_type"), metadata.get("shape"))
    if found != (spec.dtype.name, list(shape)):
        raise ValueError(f"array {path} is {found[0]!r:.50} {found[1]!r:.100}, expected {spec.dtype.name} {shape}")
    outer = _chunk_rows(metadata.get("chunk_grid"), "regular", shape, path)
    codecs = metadata.get("codecs")
    if not isinstance(codecs, list) or len(codecs) != 1:
        raise ValueError(f"array {path} has the codecs {codecs!r:.200}, expected sharding_indexed alone")
    inner = _chunk_rows(codecs[0], "sharding_indexed", shape, path)
    sharding = codecs[0]["configuration"]
    expected = [*(["transpose"] if spec.rank_major else []), "bytes", "blosc", "crc32c"]
    names = [codec.get("name") for codec in sharding["codecs"]]
    transposed = not spec.rank_major or sharding["codecs"][0].get("configuration") == {"order": [1, 0]}
    endian = sharding["codecs"][-3].get("configuration", {}).get("endian", "little") if len(names) > 2 else None
    if names != expected or not transposed or endian != "little":
        raise ValueError(f"array {path} has the inner codecs {sharding['codecs']!r:.300}, expected {expected}")
    if sharding.get("index_codecs") != _INDEX_CODECS or sharding.get("index_location", "end") != "end":
        raise ValueError(f"array {path} has another index than bytes and crc32c at the end")
    if outer % inner or outer < shape[0] or inner * spec.dtype.itemsize * (spec.width or 1) > MAX_CHUNK_BYTES:
        raise ValueError(f"array {path} has chunks of {outer} and {inner} rows for {shape[0]}")
    return inner, outer // inner


def _chunk_rows(node: Any, name: str, shape: tuple[int, ...], path: str) -> int:
    """Rows of a chunk grid, or of the sharding codec's, whose chunks must be as wide as the array."""
    chunk = node.get("configuration", {}).get("chunk_shape") if isinstance(node, dict) else None
    if not isinstance(chunk, list) or node.get("name") != name or chunk[1:] != list(shape[1:]):
        raise ValueError(f"array {path}: {name} expected with chunks as wide as {shape}, found {node!r:.200}")
    if type(chunk[0]) is not int or not 1 <= chunk[0] < 2**63:
        raise ValueError(f"array {path} has chunks of {chunk[0]!r:.50} rows")
    return chunk[0]


def _index(source: ShardBytes, name: str, chunks: int) -> np.ndarray:
    """(C, 2) uint64: offset and size of every inner chunk."""
    size, index_bytes = source.size(name), 16 * chunks + 4
    if index_bytes > size:
        raise ValueError(f"{name} has {size} bytes, too few for an index of {chunks} chunks")
    data = source.read(name, size - index_bytes, size)
    _check(data, f"the index of {name}")
    index_C2 = np.frombuffer(data[:-4], "<u8").reshape(-1, 2)
    if (index_C2 > size).any() or (index_C2.sum(axis=1) > size - index_bytes).any():
        raise ValueError(f"{name}: an inner chunk is missing or lies outside")
    return index_C2


def _chunk(source: ShardBytes, name: str, place: np.ndarray, entries: int, dtype: np.dtype) -> np.ndarray:
    """(entries,) of one inner chunk. Its decoded size is read from blosc's header before anything is allocated."""
    from numcodecs import blosc

    offset, size = int(place[0]), int(place[1])
    data = source.read(name, offset, offset + size)
    _check(data, f"{name}, bytes {offset} to {offset + size}")
    coded = data[:-4]
    claimed = [int.from_bytes(coded[at : at + 4], "little") for at in (4, 8, 12)]
    if len(coded) < _BLOSC_HEADER or claimed[0] != entries * dtype.itemsize or claimed[2] != len(coded):
        raise ValueError(f"{name}: a chunk claims {claimed[0]} bytes, expected {entries * dtype.itemsize}")
    out = np.empty(entries, dtype)
    blosc.decompress(coded, out)
    if dtype == np.bool_ and out.view(np.uint8).max(initial=0) > 1:
        raise ValueError(f"{name}: a byte that is neither true nor false")  # numpy would compute with it
    return out


def _check(data: memoryview, place: str) -> None:
    if len(data) < 4 or crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise ValueError(f"{place}: checksum of the crc32c codec does not fit")

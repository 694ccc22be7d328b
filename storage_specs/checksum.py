"""crc32c (Castagnoli) of bytes, as Zarr's codec, iSCSI and object stores use it."""

import google_crc32c


def crc32c(data: bytes | memoryview) -> int:
    """The crc32c of `data` as an unsigned 32-bit integer."""
    return google_crc32c.value(bytes(data) if isinstance(data, memoryview) else data)

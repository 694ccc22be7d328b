"""crc32c (Castagnoli) of bytes, as Zarr's codec, iSCSI and object stores use it."""

import google_crc32c
import numpy as np


def crc32c(data: bytes | memoryview) -> int:
    """The crc32c of `data` as an unsigned 32-bit integer."""
    # google_crc32c takes no memoryview, but any array; no copy is made
    return google_crc32c.value(np.frombuffer(data, np.uint8) if isinstance(data, memoryview) else data)

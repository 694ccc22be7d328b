"""Which teacher rows predict numerals. Sorted L1 was found harmful there (X-Token): `--skip_numerals` leaves them out.

Legend: C characters of a text, T teacher rows.
"""

import numpy as np

from storage_specs.document import CachedDocument


def numeral_rows(document: CachedDocument) -> np.ndarray:
    """(T,) bool: rows whose real next token has a byte of a decimal digit (of any script) in it."""
    digits_before = np.concatenate([[0], np.cumsum(_digit_bytes(document.text))])
    return digits_before[document.byte_end] > digits_before[document.byte_start]


def _digit_bytes(text: str) -> np.ndarray:
    """(bytes,) bool, True on every byte of a decimal digit."""
    if text.isascii():
        codes = np.frombuffer(text.encode(), dtype=np.uint8)
        return (codes >= ord("0")) & (codes <= ord("9"))
    codes_C = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    kinds, kind_C = np.unique(codes_C, return_inverse=True)
    is_digit = np.array([chr(code).isdecimal() for code in kinds.tolist()], dtype=bool)
    sizes = np.array([len(chr(code).encode()) for code in kinds.tolist()])
    return np.repeat(is_digit[kind_C], sizes[kind_C])

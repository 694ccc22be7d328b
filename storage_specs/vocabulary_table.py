"""The teacher's vocabulary as an object of the cache, `vocabulary.parquet`: one row per id.

token_bytes   binary, null for holes     special_role  string: bos, eos, end_of_turn or other; null for ordinary ids
"""

import hashlib
from typing import TYPE_CHECKING

from storage_specs.document import canonical_json
from storage_specs.parquet import table_from_bytes, table_to_bytes
from storage_specs.shard_names import revision_mark

if TYPE_CHECKING:
    import pyarrow as pa

    from storage_specs.vocabulary import Vocabulary

NAME = "vocabulary.parquet"
MEAN_WORD_BYTES = 256  # at most, over a vocabulary: real ones have 6 to 8
ROLES = ("bos", "eos", "end_of_turn", "other")


def name_of(revision: int) -> str:
    """The vocabulary's name where the n-th repair of a cache wrote it."""
    return f"vocabulary{revision_mark(revision)}.parquet"


def vocabulary_digest(vocabulary: "Vocabulary") -> str:
    """sha256 (hex) over the canonical JSON of [[token bytes as hex or null, ...], [[id, role], ... by id]]."""
    words = [None if word is None else word.hex() for word in vocabulary.token_bytes]
    return hashlib.sha256(canonical_json([words, sorted(vocabulary.special_roles.items())])).hexdigest()


def vocabulary_to_bytes(vocabulary: "Vocabulary") -> bytes:
    """The object's bytes."""
    import pyarrow as pa

    roles = [vocabulary.special_roles.get(token_id) for token_id in range(len(vocabulary.token_bytes))]
    return table_to_bytes(pa.table({"token_bytes": vocabulary.token_bytes, "special_role": roles}, schema=_schema()))


def vocabulary_from_bytes(data: bytes, vocab_size: int) -> "Vocabulary":
    """The vocabulary of a verified object. Raises ValueError."""
    from storage_specs.vocabulary import Vocabulary

    room = {"token_bytes": (MEAN_WORD_BYTES * vocab_size, vocab_size), "special_role": (16 * vocab_size, vocab_size)}
    table = table_from_bytes(data, _schema(), room, vocab_size)
    roles = {token_id: role for token_id, role in enumerate(table["special_role"].to_pylist()) if role is not None}
    if not set(roles.values()) <= set(ROLES):
        raise ValueError(f"its roles are {sorted(set(roles.values()))}, but must be among {', '.join(ROLES)}")
    return Vocabulary(token_bytes=table["token_bytes"].to_pylist(), special_roles=roles)


def _schema() -> "pa.Schema":
    import pyarrow as pa

    return pa.schema([("token_bytes", pa.binary()), ("special_role", pa.string())])

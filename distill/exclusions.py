"""Documents that are never trained on, by a list of their ids: what a review rejected, or anyone's own choice.

The file is plain text: a doc_id per line; what follows `#` is a remark. A doc_id is a hash of the document's content,
so one list serves every cache of the same texts.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from storage_specs.errors import ConfigError
from storage_specs.reader import Cache

__all__ = ["Exclusions", "read_exclusions"]

DOC_ID = re.compile("[0-9a-f]{64}")


class Exclusions:
    """The documents of a cache that a list names. mask_D: (D,) bool, of all documents of the cache in order.

    elsewhere: how many ids of the list the cache does not hold. Raises ConfigError for a list that names documents and
    not one of the cache.
    """

    def __init__(self, cache: Cache, doc_ids: Iterable[str], place: str | Path = "the list") -> None:
        wanted = set(doc_ids)
        self.place = place
        self.mask_D = np.fromiter((doc_id in wanted for doc_id in cache.doc_ids), dtype=bool, count=len(cache))
        held = sorted({cache.doc_ids[number] for number in np.flatnonzero(self.mask_D).tolist()})
        if wanted and not held:
            raise ConfigError(
                f"--exclude_documents {place}: none of its {len(wanted)} documents is in cache {cache.path}: name the "
                "list of a review of this cache, or of the same texts"
            )
        self.elsewhere = len(wanted) - len(held)
        self._digest = hashlib.sha256("\n".join(held).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self.mask_D.sum())

    @property
    def identity(self) -> str | None:
        """What makes a run that leaves these documents out another run; None where nothing is left out."""
        return f"{len(self)} documents, sha256 {self._digest[:16]}" if len(self) else None

    def __str__(self) -> str:
        missing = f" ({self.elsewhere} more in the list are not in this cache)" if self.elsewhere else ""
        return f"excluded by {self.place}: {len(self)} documents{missing}"


def read_exclusions(path: str | Path) -> list[str]:
    """The doc_ids of a list. Raises ConfigError: no such file, not UTF-8, a line that is no doc_id."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--exclude_documents {path}: cannot be read: {error}") from None
    doc_ids = []
    for number, line in enumerate(lines, 1):
        if not (word := line.partition("#")[0].strip()):
            continue
        if not DOC_ID.fullmatch(word):
            raise ConfigError(
                f"--exclude_documents {path}, line {number}: {word[:80]!r} is no doc_id (64 hexadecimal digits); "
                "`distill review --apply` writes such lists"
            )
        doc_ids.append(word)
    return doc_ids

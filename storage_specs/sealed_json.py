"""JSON that proves itself: one field holds the sha256 of the canonical JSON of all the others.

The stored bytes must BE the canonical JSON, so that no byte can change unnoticed. Without a JSON library of the same
number formatting: cut `"<field>":"<64 hex digits>"` and its comma out of the stored bytes and hash what remains.
"""

import hashlib
from typing import Any

from storage_specs.document import canonical_json
from storage_specs.errors import ChecksumMismatchError, MalformedObjectError, SpecVersionError
from storage_specs.strict_json import strict_json

SPEC_VERSION = 1  # of what this code writes, and the only one that it reads


def digest_of(value: Any) -> str:
    """sha256 (hex) of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def seal(value: dict[str, Any], field: str) -> bytes:
    """The canonical JSON of `value` with `spec_version` and, in `field`, the digest of all that."""
    value = {"spec_version": SPEC_VERSION, **value}
    return canonical_json({**value, field: digest_of(value)})


def unseal(data: bytes, field: str, place: str, remedy: str) -> dict[str, Any]:
    """What `seal` sealed, with `spec_version` and `field`.

    Raises SpecVersionError (another version than ours), ChecksumMismatchError, MalformedObjectError, naming `place`.
    """
    try:
        value = strict_json(data)
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, found {type(value).__name__}")
        found = digest_of({key: item for key, item in value.items() if key != field})
        canonical = canonical_json(value)
    except ValueError as error:
        raise MalformedObjectError(f"{place}: not the JSON that was written ({error}); {remedy}") from None
    version = value.get("spec_version")
    if type(version) is not int:
        raise MalformedObjectError(f"{place}: it has no spec_version; {remedy}")
    if version != SPEC_VERSION:
        raise SpecVersionError(
            f"{place}: spec_version is {version!r}, and this teach-once reads version {SPEC_VERSION} only; "
            "install the teach-once that wrote the cache, or a newer one"
        )
    if value.get(field) != found:
        raise ChecksumMismatchError(
            f"{place}: {field} is {value.get(field)!r}, but its content has {found!r}; {remedy}"
        )
    if canonical != data:
        raise ChecksumMismatchError(f"{place}: expected canonical JSON, found other spelling of it; {remedy}")
    return value

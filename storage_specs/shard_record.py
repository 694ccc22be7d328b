"""A shard's commit record, `shards/000000.json`, its last object: where record and objects verify, it is complete."""

from dataclasses import dataclass, fields
from typing import Any

from storage_specs.drift import drift_problem
from storage_specs.errors import CorruptCacheError, MalformedObjectError, SpecVersionError
from storage_specs.l1_errors import L1Errors
from storage_specs.objects import Objects
from storage_specs.sealed_json import seal, unseal
from storage_specs.shard_bytes import EncodedObject, Parts
from storage_specs.stored_object import REMEDY, StoredObject
from storage_specs.stores import stem_of


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One finished shard. Per document: doc_ids, document_rows, document_text_bytes. objects: all but the record.

    parts: how those objects are cut that have more than one part, by name. l1_errors: what storing its values cost.
    unscored_bytes: of scored spans. drift: what the run that wrote it measured of its engine (`storage_specs.drift`).
    """

    shard: int
    config_digest: str
    doc_ids: tuple[str, ...]
    document_rows: tuple[int, ...]
    document_text_bytes: tuple[int, ...]
    end_rows: int
    unscored_bytes: int
    l1_errors: L1Errors
    objects: tuple[StoredObject, ...]
    parts: dict[str, Parts]
    drift: dict[str, Any] | None

    @property
    def name(self) -> str:
        return record_name(self.shard)

    def to_bytes(self) -> bytes:
        """The record's canonical, self-proving JSON."""
        value = {item.name: getattr(self, item.name) for item in fields(self)}
        value |= {
            "l1_errors": self.l1_errors.to_json(),
            "objects": [item.to_json() for item in self.objects],
            "parts": {name: parts.to_json() for name, parts in self.parts.items()},
        }
        return seal(value, "record_digest")

    @classmethod
    def from_bytes(cls, data: bytes, place: str) -> "ShardRecord":
        """Raises ChecksumMismatchError, SpecVersionError, MalformedObjectError."""
        value = unseal(data, "record_digest", place, REMEDY)
        try:
            del value["record_digest"], value["spec_version"]
            value["objects"] = tuple(StoredObject.from_json(item, place) for item in value["objects"])
            stored = {item.name: item for item in value["objects"]}
            value["parts"] = {
                name: Parts.from_json(parts, stored[name], place) for name, parts in value["parts"].items()
            }
            value["l1_errors"] = L1Errors.from_json(value["l1_errors"])
            if problem := drift_problem(value["drift"]):
                raise ValueError(problem)
            for key in ("doc_ids", "document_rows", "document_text_bytes"):
                value[key] = tuple(value[key])
            return cls(**value)
        except CorruptCacheError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MalformedObjectError(f"{place}: not a commit record ({error!r})") from None


def described(contents: dict[str, EncodedObject]) -> tuple[tuple[StoredObject, ...], dict[str, Parts]]:
    """A record's `objects` and `parts` of a shard's encoded objects."""
    objects = tuple(StoredObject.of(name, item.data) for name, item in contents.items())
    several = {name: item for name, item in contents.items() if item.part_sizes and len(item.part_sizes) > 1}
    return objects, {name: Parts.of(item.data, item.part_sizes) for name, item in several.items()}


def record_name(shard: int) -> str:
    return f"{stem_of(shard)}.json"


def read_record(objects: Objects, shard: int, stored: StoredObject | None = None) -> ShardRecord:
    """A shard's record, its objects not yet looked at; verified, where it is known what was stored.

    Raises CorruptCacheError's kinds, SpecVersionError.
    """
    name = record_name(shard)
    record = ShardRecord.from_bytes(objects.read(name) if stored is None else objects.fetch(stored), name)
    if record.shard != shard or not all(stored.name.startswith(f"{stem_of(shard)}.") for stored in record.objects):
        raise MalformedObjectError(f"{name}: it is the record of another shard")
    return record


def verified_record(objects: Objects, shard: int, config_digest: str, doc_ids: tuple[str, ...]) -> ShardRecord | None:
    """The shard's record if it belongs to this build and every object that it names verifies (all are read)."""
    try:
        record = read_record(objects, shard)
        if record.config_digest != config_digest or record.doc_ids != doc_ids:
            return None
        for stored in record.objects:
            objects.fetch(stored)
    except (CorruptCacheError, SpecVersionError):
        return None
    return record

"""A shard's commit record, `shards/000000.json`, its last object: where record and objects verify, it is complete."""

from dataclasses import asdict, dataclass

from storage_specs.errors import CorruptCacheError, MalformedObjectError, SpecVersionError
from storage_specs.objects import Objects
from storage_specs.sealed_json import seal, unseal
from storage_specs.stored_object import REMEDY, StoredObject
from storage_specs.stores import stem_of


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One finished shard. Per document: doc_ids, document_rows, document_text_bytes. objects: all but the record.

    max_l1_error, sum_l1_error: over its rows, what storing the values cost. unscored_bytes: of scored spans.
    """

    shard: int
    config_digest: str
    doc_ids: tuple[str, ...]
    document_rows: tuple[int, ...]
    document_text_bytes: tuple[int, ...]
    end_rows: int
    unscored_bytes: int
    max_l1_error: float
    sum_l1_error: float
    objects: tuple[StoredObject, ...]

    @property
    def name(self) -> str:
        return record_name(self.shard)

    def to_bytes(self) -> bytes:
        """The record's canonical, self-proving JSON."""
        return seal(asdict(self), "record_digest")

    @classmethod
    def from_bytes(cls, data: bytes, place: str) -> "ShardRecord":
        """Raises ChecksumMismatchError, SpecVersionError, MalformedObjectError."""
        value = unseal(data, "record_digest", place, REMEDY)
        try:
            del value["record_digest"], value["spec_version"]
            value["objects"] = tuple(StoredObject.from_json(item, place) for item in value["objects"])
            for key in ("doc_ids", "document_rows", "document_text_bytes"):
                value[key] = tuple(value[key])
            return cls(**value)
        except (KeyError, TypeError) as error:
            raise MalformedObjectError(f"{place}: not a commit record ({error!r})") from None


def record_name(shard: int) -> str:
    return f"{stem_of(shard)}.json"


def read_record(objects: Objects, shard: int) -> ShardRecord:
    """A shard's record, its objects not yet looked at. Raises CorruptCacheError's kinds, SpecVersionError."""
    name = record_name(shard)
    record = ShardRecord.from_bytes(objects.read(name), name)
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

"""A shard's commit record, `shards/000000.json`, its last object: where record and objects verify, it is complete."""

from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

from storage_specs.drift import drift_problem
from storage_specs.errors import CorruptCacheError, MalformedObjectError, SpecVersionError
from storage_specs.l1_errors import L1Errors
from storage_specs.objects import Objects
from storage_specs.sealed_json import seal, unseal
from storage_specs.shard_bytes import EncodedObject, Parts
from storage_specs.shard_names import stem_of
from storage_specs.stored_object import REMEDY, StoredObject, remedy_at

MAX_BYTES = 1 << 26  # some 700,000 documents


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One finished shard. Per document: doc_ids, document_rows, document_text_bytes. objects: all but the record.

    parts: how those objects are cut that have more than one part, by name. l1_errors: what storing its values cost.
    unscored_bytes: of scored spans. replaces: cache_ids of the caches that the repair which wrote it replaced, the
    latest last; none in a shard as it was built. generation: `generated.generation_record` where the teacher wrote the
    documents, else None. drift: what the run that wrote it measured of its engine (`storage_specs.drift`), or None.
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
    replaces: tuple[str, ...] = ()
    generation: dict[str, Any] | None = None
    drift: dict[str, Any] | None = None

    def _check_types(self) -> None:
        """Raises ValueError where a field has another type, or documents another number, than any record's."""
        per_document = (self.document_rows, self.document_text_bytes)
        counts = (self.shard, self.end_rows, self.unscored_bytes, *chain(*per_document))
        texts = (self.config_digest, *self.doc_ids, *self.replaces)
        if not (
            all(type(count) is int and 0 <= count < 2**63 for count in counts)
            and all(isinstance(text, str) for text in texts)
            and all(len(sizes) == len(self.doc_ids) for sizes in per_document)
            and isinstance(self.generation, dict | None)
        ):
            raise ValueError("a field is not of its type, or documents are counted differently")

    @property
    def planned_ids(self) -> tuple[str, ...]:
        """What the plan lists for this shard: its documents, or the prompts that they answer."""
        return self.doc_ids if self.generation is None else tuple(self.generation["prompt_ids"])

    @property
    def name(self) -> str:
        return record_name(self.shard, len(self.replaces))

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
    def from_bytes(cls, data: bytes, place: str, remedy: str = REMEDY) -> "ShardRecord":
        """Raises ChecksumMismatchError, SpecVersionError, MalformedObjectError."""
        value = unseal(data, "record_digest", place, remedy)
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
            for key in ("doc_ids", "document_rows", "document_text_bytes", "replaces"):
                value[key] = tuple(value[key])
            record = cls(**value)
            record._check_types()
            return record
        except CorruptCacheError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MalformedObjectError(f"{place}: not a commit record ({error!r})") from None


def described(contents: dict[str, EncodedObject]) -> tuple[tuple[StoredObject, ...], dict[str, Parts]]:
    """A record's `objects` and `parts` of a shard's encoded objects."""
    objects = tuple(StoredObject.of(name, item.data) for name, item in contents.items())
    several = {name: item for name, item in contents.items() if item.part_sizes and len(item.part_sizes) > 1}
    return objects, {name: Parts.of(item.data, item.part_sizes) for name, item in several.items()}


def record_name(shard: int, revision: int = 0) -> str:
    return f"{stem_of(shard, revision)}.json"


def read_record(objects: Objects, shard: int, revision: int = 0, stored: StoredObject | None = None) -> ShardRecord:
    """A shard's record, its objects not yet looked at; verified, where it is known what was stored.

    Raises CorruptCacheError's kinds, SpecVersionError.
    """
    name = record_name(shard, revision)
    if stored is not None and stored.size > MAX_BYTES:
        raise MalformedObjectError(f"{name}: {stored.size} bytes, above the limit of {MAX_BYTES}")
    data = objects.read_within(name, MAX_BYTES) if stored is None else objects.fetch(stored)
    record, stem = ShardRecord.from_bytes(data, name, remedy_at(objects.place)), f"{stem_of(shard, revision)}."
    if record.name != name or not all(item.name.startswith(stem) for item in record.objects):
        raise MalformedObjectError(f"{name}: it is the record of another shard")
    return record


def verified_record(
    objects: Objects, shard: int, config_digest: str, doc_ids: tuple[str, ...] | None, revision: int = 0
) -> ShardRecord | None:
    """The shard's record if it belongs to this build and every object that it names verifies (all are read).

    `doc_ids`: what the plan lists for the shard; None where no plan is known.
    """
    try:
        record = read_record(objects, shard, revision)
        if record.config_digest != config_digest or doc_ids not in (None, record.planned_ids):
            return None
        objects.fetch_all(record.objects)
    except (CorruptCacheError, SpecVersionError):
        return None
    return record

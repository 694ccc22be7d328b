"""manifest.json: the last object of a cache, which names and proves all others."""

import re
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from storage_specs import plan
from storage_specs.columns import RowShape
from storage_specs.document import canonical_json
from storage_specs.drift import drift_problem
from storage_specs.errors import ConfigError, IncompleteCacheError, MalformedObjectError, NotACacheError
from storage_specs.objects import Objects
from storage_specs.sealed_json import seal, unseal
from storage_specs.shard_names import revision_mark
from storage_specs.shard_record import record_name
from storage_specs.stored_object import REMEDY, StoredObject, remedy_at
from storage_specs.stores import STORES

NAME = "manifest.json"
MAX_BYTES = 1_000_000
MAX_OBJECT_BYTES = 1 << 30  # of plan, shard table, document table and vocabulary
CACHE_ID = re.compile("[0-9a-f]{64}")
CODEC_KEYS = {"profile", "parameters", "bound_l1_error", "max_l1_error", "p99_l1_error", "mean_l1_error"}
_TYPES = {
    **dict.fromkeys(("teacher", "tokenizer", "engine", "windows", "corpus", "codec", "held_out", "counts"), dict),
    **dict.fromkeys(("chat_template", "generation"), dict | None),
    "config_digest": str,
}
COUNTS = ("documents", "rows", "end_rows", "empty_documents", "text_bytes", "unscored_bytes")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The fields of manifest.json, by their names there.

    cache_id: sha256 (hex) of all the others. teacher, tokenizer, chat_template, engine, windows: as the builder gave
    them. corpus: {digest, documents}. k, k_ids, vocab_size, store: see `CacheSettings`. codec: {profile, parameters,
    bound_l1_error, max_l1_error, p99_l1_error, mean_l1_error}: the bound is proven, the others measured. held_out:
    {rule, documents}. drift: `storage_specs.drift`. rank_edges: ranks between which the bins of the tail lie, None
    without bins. counts: {documents, rows, end_rows, empty_documents, text_bytes, unscored_bytes}. plan, shards,
    documents, vocabulary (None without ids): the objects plan.json, shards.parquet, documents.parquet,
    vocabulary.parquet. config_digest: of the builder's settings. replaces: cache_ids of the caches that repairs of
    this one replaced, the latest last; empty in one as it was built. generation: how the teacher wrote the
    completions, and how many were `refused`; None where it scored given texts. text: whether the documents' texts are
    kept.
    """

    spec_version: int
    cache_id: str
    teacher: dict[str, Any]
    tokenizer: dict[str, Any]
    chat_template: dict[str, Any] | None
    engine: dict[str, Any]
    windows: dict[str, Any]
    corpus: dict[str, Any]
    k: int
    k_ids: int
    vocab_size: int
    store: str
    codec: dict[str, Any]
    held_out: dict[str, Any]
    drift: dict[str, Any] | None
    rank_edges: list[int] | None
    counts: dict[str, int]
    plan: StoredObject
    shards: StoredObject
    documents: StoredObject
    vocabulary: StoredObject | None
    config_digest: str
    replaces: list[str]
    generation: dict[str, Any] | None
    text: bool

    @cached_property
    def row_shape(self) -> RowShape:
        return RowShape(
            k=self.k,
            k_ids=self.k_ids,
            vocab_size=self.vocab_size,
            profile=self.codec["profile"],
            parameters=self.codec["parameters"],
        )

    @property
    def revision(self) -> int:
        """How often the cache was repaired."""
        return len(self.replaces)

    @property
    def stored(self) -> StoredObject:
        """manifest.json itself."""
        return StoredObject.of(NAME, canonical_json(self.to_json()))

    @property
    def objects(self) -> tuple[StoredObject, ...]:
        """The cache's objects that belong to no shard, without manifest.json."""
        return tuple(filter(None, (self.plan, self.shards, self.documents, self.vocabulary)))

    def to_json(self) -> dict[str, Any]:
        """JSON values, as in manifest.json."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {key: item.to_json() if isinstance(item, StoredObject) else item for key, item in values.items()}


def read_manifest(objects: Objects) -> Manifest:
    """The manifest of a finished cache.

    Raises NotACacheError, IncompleteCacheError (with how many shards are missing), SpecVersionError, and
    CorruptCacheError's kinds.
    """
    size = objects.size(NAME)
    if size is not None:
        _check_length(size, NAME)
        return manifest_from_bytes(objects.read(NAME), remedy=remedy_at(objects.place))
    if objects.size(plan.NAME) is None:
        raise NotACacheError(f"{objects.place}: no cache here: expected {NAME}")
    planned, _ = plan.plan_from_bytes(objects.read_within(plan.NAME, plan.MAX_BYTES))
    shards = range(len(planned.shards))
    missing = sum(objects.size(record_name(shard)) is None for shard in shards)
    remedy = (
        "run the same `cache-builder build` command again"
        if missing
        else f"run `cache-builder finalize {objects.place}`"
    )
    raise IncompleteCacheError(
        f"{objects.place}: the build has not finished: {missing} of {len(shards)} shards are missing; {remedy}"
    )


def manifest_to_bytes(values: dict[str, Any]) -> bytes:
    """manifest.json of all fields but cache_id and spec_version."""
    return seal(values, "cache_id")


def kept_name(revision: int) -> str:
    """Under which name a repair keeps the manifest that it replaces."""
    return f"manifest{revision_mark(revision) or '.r0'}.json"


def manifest_from_bytes(data: bytes, place: str = NAME, remedy: str = REMEDY) -> Manifest:
    """Raises SpecVersionError, ChecksumMismatchError, MalformedObjectError naming `place`."""
    _check_length(len(data), place)
    value = unseal(data, "cache_id", place, remedy)
    try:
        for key in ("plan", "shards", "documents", "vocabulary"):
            if key != "vocabulary" or value[key] is not None:
                value[key] = StoredObject.from_json(value[key], f"{place}, {key}")
        manifest = Manifest(**value)
        problem = _problem_of(manifest)
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise MalformedObjectError(f"{place}: not a manifest ({error})") from None
    if problem:
        raise MalformedObjectError(f"{place}: {problem}")
    return manifest


def _check_length(length: int, place: str) -> None:
    if length > MAX_BYTES:
        raise MalformedObjectError(f"{place}: {length} bytes, above the limit of {MAX_BYTES}")


def _problem_of(manifest: Manifest) -> str | None:
    for name, kinds in _TYPES.items():
        if not isinstance(getattr(manifest, name), kinds):
            return f"{name} is {getattr(manifest, name)!r:.100}"
    for name, keys in (("corpus", {"digest", "documents"}), ("held_out", {"rule", "documents"}), ("codec", CODEC_KEYS)):
        if set(getattr(manifest, name)) != keys:
            return f"{name} must have {', '.join(sorted(keys))}"
    if not type(manifest.corpus["documents"]) is type(manifest.held_out["documents"]) is int:
        return "corpus and held_out must count their documents"
    errors = [manifest.codec[key] for key in CODEC_KEYS if key.endswith("_l1_error")]
    if not all(type(error) in (int, float) and error >= 0 for error in errors):
        return f"the L1 errors of codec are {errors!r:.200}"
    counts = manifest.counts
    if set(counts) != set(COUNTS) or not all(type(count) is int and count >= 0 for count in counts.values()):
        return f"counts must be {', '.join(COUNTS)}"
    k, k_ids, vocab_size = sizes = (manifest.k, manifest.k_ids, manifest.vocab_size)
    if not all(type(size) is int for size in sizes) or not (0 <= k_ids <= k <= vocab_size <= 2**32 and k >= 1):
        return f"k, k_ids and vocab_size are {sizes}, but 0 <= k_ids <= k <= vocab_size <= 2^32 and k >= 1 must hold"
    for stored in manifest.objects:
        if stored.size > MAX_OBJECT_BYTES:
            return f"{stored.name} has {stored.size} bytes, above the limit of {MAX_OBJECT_BYTES}"
    if manifest.store not in STORES:
        return f"store {manifest.store!r} is none of {', '.join(STORES)}"
    if problem := drift_problem(manifest.drift):
        return problem
    edges = manifest.row_shape.rank_edges
    if manifest.rank_edges != (None if edges is None else list(edges)):
        return f"rank_edges are {manifest.rank_edges!r:.100}, but those of its codec are {edges!r:.100}"
    if edges is not None and edges[-1] != vocab_size:
        return f"rank_edges end at {edges[-1]}, but vocab_size is {vocab_size}"
    if manifest.generation is not None and not isinstance(manifest.generation, dict):
        return "generation must be an object, or null where texts were scored"
    if (manifest.vocabulary is None) != (manifest.k_ids == 0):
        return "a vocabulary belongs to a cache exactly where ids do"
    if type(manifest.text) is not bool:
        return f"text is {manifest.text!r:.50}, but must be true or false"
    ids = manifest.replaces
    if not isinstance(ids, list) or not all(isinstance(item, str) and CACHE_ID.fullmatch(item) for item in ids):
        return "replaces must be a list of cache_ids"
    return None

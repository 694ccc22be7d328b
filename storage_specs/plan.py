"""The plan: which documents each shard holds. Made once, before anything is scored; every shard is then one job."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from storage_specs.document import Document
from storage_specs.errors import ConfigError, CorpusError, MalformedObjectError
from storage_specs.sealed_json import digest_of, seal, unseal

NAME = "plan.json"
MAX_BYTES = 1 << 30  # some 16 million documents


@dataclass(frozen=True, kw_only=True)
class Plan:
    """doc_ids: of the whole corpus, in order. shards: for each shard the range of document numbers it holds."""

    doc_ids: tuple[str, ...]
    shards: tuple[range, ...]

    @cached_property
    def corpus_digest(self) -> str:
        """sha256 (hex) of the canonical JSON list of all doc_ids in order."""
        return digest_of(list(self.doc_ids))

    def doc_ids_of(self, shard: int) -> tuple[str, ...]:
        return tuple(self.doc_ids[number] for number in self.shards[shard])


def make_plan(documents: Sequence[Document], documents_per_shard: int) -> Plan:
    """Cut a corpus into shards of `documents_per_shard`; the last may be smaller. CorpusError, ConfigError."""
    if documents_per_shard < 1:
        raise ConfigError(f"documents_per_shard is {documents_per_shard}, but must be at least 1")
    if not documents:
        raise CorpusError("the corpus has no documents, so there is nothing to plan")
    starts = range(0, len(documents), documents_per_shard)
    return Plan(
        doc_ids=tuple(document.doc_id for document in documents),
        shards=tuple(range(start, min(start + documents_per_shard, len(documents))) for start in starts),
    )


def plan_to_bytes(plan: Plan, config: dict[str, Any]) -> bytes:
    """plan.json: the plan, and `config` = `CacheSettings.config`. Raises CorpusError: too many documents for a plan."""
    value = {
        "config": config,
        "config_digest": digest_of(config),
        "corpus_digest": plan.corpus_digest,
        "documents_per_shard": [len(shard) for shard in plan.shards],
        "doc_ids": list(plan.doc_ids),
    }
    data = seal(value, "plan_digest")
    if len(data) > MAX_BYTES:
        raise CorpusError(
            f"the corpus has {len(plan.doc_ids)} documents, too many for one cache (a plan has at most {MAX_BYTES} "
            "bytes): build several caches and merge them"
        )
    return data


def plan_from_bytes(data: bytes, place: str = NAME) -> tuple[Plan, dict[str, Any]]:
    """(plan, config) of plan.json. SpecVersionError, ChecksumMismatchError, MalformedObjectError."""
    value = unseal(data, "plan_digest", place, "restore it from a copy of the cache, or build into a new folder")
    try:
        sizes, doc_ids = value["documents_per_shard"], tuple(value["doc_ids"])
        ends = list(itertools.accumulate(sizes))
        plan = Plan(
            doc_ids=doc_ids, shards=tuple(range(end - size, end) for size, end in zip(sizes, ends, strict=True))
        )
        consistent = (
            min(sizes) > 0
            and ends[-1] == len(doc_ids)
            and plan.corpus_digest == value["corpus_digest"]
            and digest_of(value["config"]) == value["config_digest"]
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise MalformedObjectError(f"{place}: not a plan ({error!r})") from None
    if not consistent:
        raise MalformedObjectError(f"{place}: its shards, documents and digests contradict one another")
    return plan, value["config"]


def differences(plan: Plan, config: dict[str, Any], other_plan: Plan, other_config: dict[str, Any]) -> str:
    """What tells two builds apart, the first's value before the second's: `k: 64, not 32; teacher.dtype: ...`."""
    found = []
    if plan.corpus_digest != other_plan.corpus_digest:
        found.append(f"corpus: {len(plan.doc_ids)} documents, not these {len(other_plan.doc_ids)}")
    if plan.shards != other_plan.shards:
        found.append(f"documents per shard: {len(plan.shards[0])}, not {len(other_plan.shards[0])}")
    return "; ".join(filter(None, [*found, config_differences(config, other_config)])) or "plan.json itself"


def config_differences(config: dict[str, Any], other_config: dict[str, Any]) -> str:
    """What tells two settings apart, the first's value before the second's; empty where nothing does."""
    return "; ".join(_differing("", config, other_config))


def _differing(name: str, first: Any, second: Any) -> list[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        keys = sorted({*first, *second})
        return [line for key in keys for line in _differing(f"{name}.{key}", first.get(key), second.get(key))]
    return [] if first == second else [f"{name[1:]}: {first!r:.80}, not {second!r:.80}"]

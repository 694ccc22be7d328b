"""`repair`: damaged shards are scored again, with the teacher and the settings that the cache was built with."""

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cache_builder.build_config import SAMPLING, BuildConfig
from cache_builder.preparation import Preparation, prepare
from cache_builder.progress import Progress
from cache_builder.shard_worker import Recipe, ShardWorker
from storage_specs import manifest as manifest_json
from storage_specs import vocabulary_table
from storage_specs.diagnosis import Diagnosis, diagnose
from storage_specs.document import Document
from storage_specs.errors import CacheMismatchError, CorpusError, MalformedObjectError
from storage_specs.lease import lease
from storage_specs.manifest import Manifest
from storage_specs.merging import common_config
from storage_specs.object_roots import open_objects
from storage_specs.plan import config_differences, plan_to_bytes
from storage_specs.repairing import commit_revision, lost_documents, restore
from storage_specs.revisions import newest_record
from storage_specs.shard_record import ShardRecord
from storage_specs.stored_object import StoredObject
from storage_specs.writer import encoded_shard


@dataclass(frozen=True, kw_only=True)
class RepairReport:
    """What one call did. manifest: of the cache as it is now, None where it needs a teacher to become whole.

    restored: names of objects that were put back as they were. shards_scored: again. lost: for each shard that is still
    damaged its documents, (id, text or None where the text is damaged, too).
    """

    manifest: Manifest | None
    restored: tuple[str, ...]
    shards_scored: int
    lost: dict[int, list[tuple[str, str | None]]]
    vocabulary_lost: bool


def repair(
    place: str | os.PathLike[str], flags: dict[str, Any], progress: Callable[[int, int], None] | None = None
) -> RepairReport:
    """Mend the cache at `place`. flags: fields of `BuildConfig`; without a `teacher` nothing is scored.

    Settings that are not given are the cache's own. `progress(done, all)`: called while the shards are looked at.
    Raises what `diagnose`, `prepare` and writing raise, CacheMismatchError where the teacher or the settings are
    others, CorpusError where the corpus lacks documents of a lost shard.
    """
    with lease(open_objects(place)):
        diagnosis = _diagnosis(place, flags, progress)
        manifest, scored = restore(diagnosis), 0
        if manifest is None and "teacher" in flags:
            prepared = _prepared(place, diagnosis, flags)
            manifest, scored = _score_again(diagnosis, prepared), len(diagnosis.lost_shards)
        still_lost = diagnosis.lost_shards if manifest is None else []
        return RepairReport(
            manifest=manifest,
            restored=tuple(diagnosis.restorable),
            shards_scored=scored,
            lost={shard: lost_documents(diagnosis, shard) for shard in still_lost},
            vocabulary_lost=manifest is None and diagnosis.vocabulary_lost,
        )


def _diagnosis(
    place: str | os.PathLike[str], flags: dict[str, Any], progress: Callable[[int, int], None] | None
) -> Diagnosis:
    try:
        return diagnose(place, progress)
    except MalformedObjectError:  # the plan is lost: the flags of the build make it anew
        if "teacher" not in flags:
            raise
        recipe = prepare(BuildConfig(**flags, output=place)).recipe
        return diagnose(place, progress, supposed_plan=plan_to_bytes(recipe.plan, recipe.settings.config))


def settings_of(config: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Fields of `BuildConfig` by the settings of a cache, overridden by those that were given."""
    template, generation = config["chat_template"] or {}, config["generation"]
    own = {name: config[name] for name in ("k", "k_ids", "store", "profile")} | {"no_text": not config["text"]}
    if "rank_edges" in config["parameters"]:
        own["tail_bins"] = len(config["parameters"]["rank_edges"]) - 1
    own |= {
        "engine": config["engine"]["name"],
        "dtype": config["teacher"]["dtype"],
        "revision": None if Path(flags["teacher"]).is_dir() else config["teacher"]["revision"],
        "max_model_len": config["windows"]["max_model_len"],
        "bos_token": config["tokenizer"]["bos_token"],
        "chat_template_kwargs": template.get("kwargs", {}),
    }
    if generation is None:
        own |= {"window_overlap": config["windows"]["overlap"]}
        own |= {"score_roles": tuple(template["score_roles"])} if template else {}
    else:
        own |= {"mode": "generate"} | {name: generation[name] for name in SAMPLING if name in generation}
    return own | flags


def _prepared(place: str | os.PathLike[str], diagnosis: Diagnosis, flags: dict[str, Any]) -> Preparation:
    """The teacher and the documents to be scored again. Raises CacheMismatchError, CorpusError."""
    config, plan = diagnosis.config, diagnosis.plan
    prepared = prepare(BuildConfig(**settings_of(config, flags), output=place))
    recipe = prepared.recipe
    common_config([(str(place), config), ("this command", recipe.settings.config)])
    settings = replace(recipe.settings, chat_template=config["chat_template"])  # of a corpus that holds more, or less
    if settings.config != config:
        raise CacheMismatchError(f"{place}: {config_differences(config, settings.config)}")
    by_id: dict[str, Document] = {document.doc_id: document for document in prepared.documents}
    wanted = [doc_id for shard in diagnosis.lost_shards for doc_id in plan.doc_ids_of(shard)]
    absent = [doc_id for doc_id in wanted if doc_id not in by_id]
    if absent:
        raise CorpusError(
            f"the corpus lacks {len(absent)} of the {len(wanted)} documents of the damaged shards (the first is "
            f"{absent[0]}): give the corpus that the cache was built from"
        )
    documents = [by_id.get(doc_id) for doc_id in plan.doc_ids]
    return replace(prepared, documents=documents, recipe=replace(recipe, settings=settings, plan=plan))


def _score_again(diagnosis: Diagnosis, prepared: Preparation) -> Manifest:
    """Score the lost shards, and write the manifest."""
    objects, recipe = diagnosis.objects, prepared.recipe
    if diagnosis.manifest is None:  # a damaged one proves nothing: the cache is built to its end, like any other
        objects.delete(manifest_json.NAME)
    worker, lost, records = ShardWorker(recipe, prepared.engine), diagnosis.lost_shards, list(diagnosis.records)
    left = {} if diagnosis.manifest is None else {shard: _revised(diagnosis, recipe, shard) for shard in lost}
    records = [left.get(shard) or record for shard, record in enumerate(records)]
    jobs = [(shard, prepared.members(shard)) for shard in lost if left.get(shard) is None]
    done = len(records) - len(jobs)
    with closing(prepared.engine), Progress(prepared.characters(s for s, _ in jobs), done, len(records)) as progress:
        for opened, documents in worker.finished(jobs, progress):
            shard = opened.shard
            if diagnosis.manifest is None:
                worker.writer.write_shard(shard, documents)
            else:
                planned = diagnosis.plan.doc_ids_of(shard)
                record, contents = encoded_shard(shard, documents, recipe.settings, planned, diagnosis.replaces)
                objects.write_all(contents)
                objects.write_all({record.name: record.to_bytes()})
                records[shard] = record
            progress.shard_done()
    if diagnosis.manifest is None:
        return worker.writer.finalize()
    restored = not diagnosis.vocabulary_lost or _restore_vocabulary(diagnosis, recipe)
    if restored and not lost and not diagnosis.renewed:
        return diagnosis.manifest
    return commit_revision(diagnosis, records)


def _revised(diagnosis: Diagnosis, recipe: Recipe, shard: int) -> ShardRecord | None:
    """The record that an interrupted repair left of a shard under its new names, if there is one."""
    planned, replaces = diagnosis.plan.doc_ids_of(shard), diagnosis.replaces
    record = newest_record(diagnosis.objects, shard, recipe.settings.config_digest, planned, [len(replaces)])
    return record if record is not None and record.replaces == replaces else None


def _restore_vocabulary(diagnosis: Diagnosis, recipe: Recipe) -> bool:
    """Put the vocabulary back, or beside it where its bytes came out otherwise: whether it is the very object."""
    stored = diagnosis.manifest.vocabulary if diagnosis.manifest else None
    data = vocabulary_table.vocabulary_to_bytes(recipe.settings.vocabulary)
    exact = stored is not None and StoredObject.of(stored.name, data) == stored
    name = stored.name if exact and stored else vocabulary_table.name_of(len(diagnosis.replaces))
    diagnosis.objects.write_all({name: data})
    return exact

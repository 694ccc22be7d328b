"""`build --extend OLD`: a new cache that holds the shards of an old one, and after them what the corpus has beyond it.

Only the new documents are scored; the result is what `merge` makes of the old cache and a build of the new documents.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

from cache_builder.shard_worker import Recipe
from storage_specs.document import Document
from storage_specs.errors import CorpusError
from storage_specs.merging import Source, common_config, joined_plans, take_over
from storage_specs.plan import make_plan
from storage_specs.planned_cache import PlannedCache


def extended(
    recipe: Recipe, documents: Sequence[Document], old: str | os.PathLike[str], documents_per_shard: int
) -> tuple[Recipe, list[Document], Source]:
    """Recipe, documents to be scored and base of a build that extends the cache at `old`. Documents that it holds, by
    doc_id, fall away.

    Raises CacheMismatchError (the cache was built with other settings), CorpusError (nothing is left to add), and what
    `open_cache` raises.
    """
    base = Source.at(old)
    known = set(base.plan.doc_ids)
    documents = [document for document in documents if document.doc_id not in known]
    if not documents:
        raise CorpusError(f"every document of the corpus is in {old} already: there is nothing to add")
    common = common_config([(str(old), base.config), ("this build", recipe.settings.config)])
    recipe = replace(
        recipe,
        settings=replace(recipe.settings, chat_template=common["chat_template"]),
        plan=joined_plans([base.plan, make_plan(documents, documents_per_shard)]),
    )
    return recipe, documents, base


def take_over_base(writer: PlannedCache, base: Source, missing: list[int]) -> list[int]:
    """Link those of the missing shards that the old cache has; returns the others, which are to be scored."""
    of_base = len(base.plan.shards)
    for shard in missing:
        if shard < of_base:
            take_over(writer, shard, base, shard)
    return [shard for shard in missing if shard >= of_base]

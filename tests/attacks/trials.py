"""Makes the caches of the attack gallery and has them read in one child process."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from gallery import Attack
from measuring import Refusal, measure
from small_caches import STORES, some_documents, some_settings, write_cache

LIMIT_MILLISECONDS = 100.0  # of processor time
LIMIT_MIB = 64.0  # above what is resident once all libraries are imported and have read a good cache


def good_caches(folder: Path) -> dict[str, Path]:
    """{store: a small cache of seven documents in three shards}."""
    for store in STORES:
        write_cache(folder / store, some_documents(7), some_settings(store))
    return {store: folder / store for store in STORES}


def refusals(attacks: Sequence[Attack], folder: Path) -> dict[Attack, Refusal]:
    """How every attack's cache was refused, or that it was not."""
    good = good_caches(folder)
    caches = []
    for attack in attacks:
        cache = folder / "attacks" / attack.name / "cache"  # of its own folder: some put files beside the cache
        shutil.copytree(good[attack.store], cache)
        attack.make(cache)
        caches.append(cache)
    return dict(zip(attacks, measure(caches, list(good.values())), strict=True))


def problem_of(attack: Attack, refusal: Refusal) -> str | None:
    """Why an attack was not refused as it must be, if so."""
    if set(refusal.errors) != set(attack.ways):
        return f"raised by {sorted(refusal.errors)}, expected {sorted(attack.ways)}: {refusal.message}"
    if not refusal.typed or not re.search(attack.refusal, refusal.message):
        return f"{refusal.errors}: expected {attack.refusal!r}, found: {refusal.message}"
    if refusal.milliseconds > LIMIT_MILLISECONDS or refusal.mib > LIMIT_MIB:
        return f"took {refusal.milliseconds:.0f} ms and {refusal.mib:.0f} MiB: {refusal.message}"
    return None

"""What the objects of a shard are called."""


def stem_of(shard: int, revision: int = 0) -> str:
    """What the names of all objects of a shard start with; a repaired shard has names of its own."""
    return f"shards/{shard:06d}{revision_mark(revision)}"


def revision_mark(revision: int) -> str:
    """What the n-th repair of a cache puts into the names of what it writes; nothing in a cache as it was built."""
    return f".r{revision}" if revision else ""

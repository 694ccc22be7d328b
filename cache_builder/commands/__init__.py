"""The commands of `cache-builder`, one module each: `parser()` has its flags, `run(arguments)` does it.

A module's own imports are light, so that `--help` answers at once; heavy ones stay inside `run`.
"""

SUMMARY = {
    "plan": "say what a build will read, store and cost, before a GPU is touched",
    "build": "score a corpus with a teacher and write the cache; the same command resumes",
    "finalize": "write the manifest of a cache whose shards are all there",
    "repair": "mend a damaged cache: rebuild what follows from the rest, score damaged shards again",
    "gc": "remove what belongs to no cache any more: orphans of killed builds, older revisions",
    "merge": "make one cache of many of the same teacher",
    "convert": "write a cache in the other store, bit for bit the same",
    "verify": "check every stored byte of a cache",
    "push": "copy a finished cache to another folder or object store, or from there",
    "inspect": "say what is in a cache, and what its columns cost",
}

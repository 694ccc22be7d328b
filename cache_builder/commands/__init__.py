"""The commands of `cache-builder`, one module each: `parser()` has its flags, `run(arguments)` does it.

A module's own imports are light, so that `--help` answers at once; heavy ones stay inside `run`.
"""

SUMMARY = {
    "build": "score a corpus with a teacher and write the cache; the same command resumes",
    "finalize": "write the manifest of a cache whose shards are all there",
    "verify": "check every stored byte of a cache",
    "inspect": "say what is in a cache, and what its columns cost",
}

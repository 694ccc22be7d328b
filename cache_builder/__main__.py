"""`python -m cache_builder ...` is the console script `cache-builder ...`."""

from cache_builder.main import entry

if __name__ == "__main__":  # vLLM's worker processes import this module again
    entry()

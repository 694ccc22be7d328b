"""What a cache is: documents, byte coordinates, and the files that hold a teacher's distributions.

The ground floor: imports neither torch nor transformers nor vllm. The names below are the public ones; they are loaded
when first used, so that a command's `--help` never waits for Arrow or Zarr.
"""

import importlib
from typing import Any

_HOME_OF = {
    "CacheSettings": "writer",
    "CacheWriter": "writer",
    "CachedDocument": "document",
    "Document": "document",
    "Encoding": "encoding",
    "Message": "document",
    "TokenSequence": "rendering",
    "Window": "windows",
    "byte_spans": "encoding",
    "chat_document": "document",
    "completion_document": "document",
    "cut_windows": "windows",
    "encode": "encoding",
    "from_sentencepiece": "foreign_tokenizers",
    "from_tiktoken": "foreign_tokenizers",
    "is_held_out": "document",
    "make_plan": "plan",
    "open_cache": "reader",
    "render": "rendering",
    "spans_of_ids": "vocabulary",
    "special_roles": "vocabulary",
    "text_document": "document",
    "token_bytes": "vocabulary",
    "verify_cache": "verification",
}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'storage_specs' has no attribute {name!r}")
    return getattr(importlib.import_module(f"storage_specs.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__

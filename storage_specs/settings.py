"""What decides a cache's rows: two builders with the same settings and corpus write the same cache."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from storage_specs.columns import RowShape
from storage_specs.document import canonical_json
from storage_specs.errors import ConfigError
from storage_specs.sealed_json import SPEC_VERSION, digest_of
from storage_specs.stores import STORES
from storage_specs.vocabulary_table import vocabulary_digest

if TYPE_CHECKING:
    from storage_specs.vocabulary import Vocabulary

LARGEST_VOCABULARY = 2**32
DEFAULT_PROFILE = "compact"


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Raises ConfigError for what cannot be.

    teacher, tokenizer, chat_template (None where the corpus has no chats), engine, windows: JSON objects that say which
    they are (names, revisions, digests, versions); the format keeps them as they are. k: sorted values per row.
    k_ids: ranks whose ids are kept, 0 to k. vocab_size: the teacher's. store: "zarr" or "arrow".
    profile, parameters: of the value codec (`codecs.codec_of`), its own defaults where none are given.
    vocabulary: the teacher's words, needed exactly where k_ids > 0, with vocab_size entries. generation: how the
    teacher wrote completions (a JSON object), None where it scored texts that were there. text: whether the documents'
    texts are kept (`textless`).
    """

    teacher: dict[str, Any]
    tokenizer: dict[str, Any]
    chat_template: dict[str, Any] | None
    engine: dict[str, Any]
    k: int
    k_ids: int
    vocab_size: int
    store: str = "zarr"
    profile: str = DEFAULT_PROFILE
    parameters: dict[str, Any] = field(default_factory=dict)
    windows: dict[str, Any]
    vocabulary: "Vocabulary | None" = None
    generation: dict[str, Any] | None = None
    text: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.vocab_size <= LARGEST_VOCABULARY:
            raise ConfigError(f"vocab_size is {self.vocab_size}, but must be from 1 to {LARGEST_VOCABULARY}")
        if not 1 <= self.k <= self.vocab_size:
            raise ConfigError(f"k is {self.k}, but must be from 1 to the vocabulary's size, {self.vocab_size}")
        if not 0 <= self.k_ids <= self.k:
            raise ConfigError(f"k_ids is {self.k_ids}, but must be from 0 to k, which is {self.k}")
        if self.generation is not None and not self.text:
            raise ConfigError("text must be kept where the teacher writes it: nobody else could give it again")
        if self.store not in STORES:
            raise ConfigError(f"store is {self.store!r}, but must be {' or '.join(STORES)}")
        if (self.row_shape.rank_edges or (self.vocab_size,))[-1] != self.vocab_size:
            raise ConfigError(
                f"rank_edges end at {self.row_shape.rank_edges[-1]}, not at {self.vocab_size}, vocab_size"
            )
        words = None if self.vocabulary is None else len(self.vocabulary.token_bytes)
        if words != (self.vocab_size if self.k_ids else None):
            raise ConfigError(
                f"k_ids is {self.k_ids}, so the vocabulary must have {self.vocab_size if self.k_ids else 'no'} words, "
                f"but it has {words or 'none'}"
            )

    @cached_property
    def row_shape(self) -> RowShape:
        return RowShape(
            k=self.k,
            k_ids=self.k_ids,
            vocab_size=self.vocab_size,
            profile=self.profile,
            parameters=self.parameters,
        )

    @cached_property
    def config(self) -> dict[str, Any]:
        """All of it as JSON values, the vocabulary as its digest: what plan.json keeps and `config_digest` covers."""
        config = {
            "spec_version": SPEC_VERSION,
            "teacher": self.teacher,
            "tokenizer": self.tokenizer,
            "chat_template": self.chat_template,
            "engine": self.engine,
            "k": self.k,
            "k_ids": self.k_ids,
            "vocab_size": self.vocab_size,
            "store": self.store,
            "profile": self.profile,
            "parameters": self.row_shape.codec.parameters,
            "windows": self.windows,
            "generation": self.generation,
            "text": self.text,
            "vocabulary_digest": None if self.vocabulary is None else vocabulary_digest(self.vocabulary),
        }
        try:
            return json.loads(canonical_json(config))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"teacher, tokenizer, chat_template, engine and windows must be JSON: {error}") from None

    @property
    def config_digest(self) -> str:
        """sha256 (hex) of `config`."""
        return digest_of(self.config)

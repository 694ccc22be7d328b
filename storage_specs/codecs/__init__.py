"""The value codecs: one profile each, from bit-exact to a whole vocabulary in a few numbers; `codec_of` finds them."""

from collections.abc import Mapping

from storage_specs.codecs.base import ArraySpec, Codec, RowValues, encode_measured, l1_error
from storage_specs.codecs.compact import CompactCodec
from storage_specs.codecs.exact import ExactCodec
from storage_specs.codecs.half import HalfCodec
from storage_specs.codecs.sketch import BINS, HEAD, SketchCodec
from storage_specs.errors import ConfigError
from storage_specs.sketch import log_rank_edges

__all__ = [
    "BINS",
    "PROFILES",
    "ArraySpec",
    "Codec",
    "RowValues",
    "SketchCodec",
    "codec_of",
    "default_k",
    "default_parameters",
    "encode_measured",
    "l1_error",
]

_CODECS = {codec.profile: codec for codec in (ExactCodec, HalfCodec, CompactCodec, SketchCodec)}
PROFILES = tuple(_CODECS)
DEFAULT_K = 64


def default_k(profile: str) -> int:
    """How many values of a row a profile keeps where nobody says: the sketch needs few, its bins hold the rest."""
    return HEAD if profile == SketchCodec.profile else DEFAULT_K


def default_parameters(profile: str, *, k: int, vocab_size: int, bins: int = BINS) -> dict[str, list[int]]:
    """`parameters` where nobody says more than the sketch's bins. Raises ConfigError: too many bins for the tail."""
    if profile == SketchCodec.profile:
        return {"rank_edges": log_rank_edges(k, vocab_size, bins).tolist()}
    return {}


def codec_of(profile: str, *, k: int, parameters: Mapping[str, object] | None = None) -> Codec:
    """The codec of a profile; `parameters` as an earlier codec told them; what is left out has its default.

    The sketch needs `rank_edges` among them (`default_parameters`). Raises ConfigError for an unknown profile, unknown
    parameters, and values that no codec can have.
    """
    if profile not in _CODECS:
        raise ConfigError(f"codec profile {profile!r} is none of {', '.join(PROFILES)}")
    try:
        return _CODECS[profile](k=k, **parameters or {})
    except TypeError as error:
        raise ConfigError(f"codec profile {profile}: {error}") from None

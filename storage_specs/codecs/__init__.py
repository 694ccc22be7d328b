"""The value codecs: one profile each, from bit-exact to a whole vocabulary in a few numbers; `codec_of` finds them."""

from collections.abc import Mapping

from storage_specs.codecs.base import ArraySpec, Codec, RowValues, encode_measured, l1_error
from storage_specs.codecs.compact import CompactCodec
from storage_specs.codecs.exact import ExactCodec
from storage_specs.codecs.half import HalfCodec
from storage_specs.errors import ConfigError

__all__ = ["PROFILES", "ArraySpec", "Codec", "RowValues", "codec_of", "encode_measured", "l1_error"]

_CODECS = {codec.profile: codec for codec in (ExactCodec, HalfCodec, CompactCodec)}
PROFILES = tuple(_CODECS)


def codec_of(profile: str, *, k: int, parameters: Mapping[str, object] | None = None) -> Codec:
    """The codec of a profile; `parameters` as an earlier codec told them, or None for the profile's defaults.

    Raises ConfigError for an unknown profile, unknown parameters, and values that no codec can have.
    """
    if profile not in _CODECS:
        raise ConfigError(f"codec profile {profile!r} is none of {', '.join(PROFILES)}")
    try:
        return _CODECS[profile](k=k, **parameters or {})
    except TypeError as error:
        raise ConfigError(f"codec profile {profile}: {error}") from None

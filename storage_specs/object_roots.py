"""What a place names: a local folder, or a folder in an object store, and the objects under it."""

import os
import re

from storage_specs.errors import ConfigError
from storage_specs.objects import Objects

OBJECT_STORES = ("s3", "gs", "az")  # read and written, through obstore
HUB = "hf"  # read only
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_MANGLED = re.compile(rf"({'|'.join((*OBJECT_STORES, HUB))}):/[^/]")  # what pathlib makes of a URL


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether a place is a URL, not a path of this machine."""
    return _SCHEME.match(os.fspath(place)) is not None


def open_objects(place: str | os.PathLike[str]) -> Objects:
    """The objects under a local folder, or under an s3://, gs://, az:// or hf:// URL. Nothing is looked at yet.

    Raises ConfigError: a scheme that is none of these, or a package that is not installed.
    """
    text = os.fspath(place)
    scheme = _SCHEME.match(text)
    if scheme is None:
        if _MANGLED.match(text):
            raise ConfigError(f"{text}: a URL that went through pathlib.Path: pass it as a str, with both slashes")
        from storage_specs.local_objects import LocalObjects

        return LocalObjects(place)
    if scheme[1] == HUB:
        from storage_specs.hub_objects import HubObjects

        return HubObjects(text)
    if scheme[1] in OBJECT_STORES:
        from storage_specs.remote_objects import RemoteObjects

        return RemoteObjects(text)
    known = ", ".join(f"{name}://" for name in (*OBJECT_STORES, HUB))
    raise ConfigError(f"{text}: {scheme[1]}:// is none of {known}; local folders are written without a scheme")

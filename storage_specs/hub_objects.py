"""Objects in a repository of the Hugging Face hub (hf://datasets/USER/REPO@REVISION/FOLDER), read only, by fsspec.

A branch or tag is resolved once, so that all objects come from one commit. The token is huggingface_hub's business
(HF_TOKEN or `hf auth login`), and so are the endpoint (HF_ENDPOINT) and repeating requests that failed.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, NoReturn, TypeVar

from storage_specs.errors import (
    ChecksumMismatchError,
    ConfigError,
    MissingObjectError,
    SizeMismatchError,
    StoreAccessError,
    StoreUnavailableError,
    StoreUnsupportedError,
    TeachOnceError,
)
from storage_specs.objects import ByteRange, Objects
from storage_specs.stored_object import StoredObject, check_length, remedy_at

Answer = TypeVar("Answer")
REQUESTS_AT_ONCE = 8


class HubObjects(Objects):
    """Objects below an hf:// URL. Threads, forked and spawned processes may share it."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError (no huggingface_hub)."""
        self.root = url.removesuffix("/")
        try:
            from huggingface_hub import HfFileSystem
        except ImportError:
            raise ConfigError(
                f"{self.root}: the hub is read by huggingface_hub, which is not installed: "
                "pip install 'teach-once[cloud]'"
            ) from None
        self._files = HfFileSystem(endpoint=os.environ.get("HF_ENDPOINT"))

    def __reduce__(self) -> tuple:
        return HubObjects, (self.root,)

    def size(self, name: str) -> int | None:
        path = f"{self._commit}/{name}"
        try:
            found = self._ask(name, lambda: self._files.info(path))
        except FileNotFoundError:
            return None
        return found["size"] if found["type"] == "file" else None

    def read(self, name: str) -> bytes:
        size = self.size(name)
        if size is None:
            raise self._missing(name)
        return self.read_range(name, 0, size)

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        path = f"{self._commit}/{name}"

        def get() -> bytes:
            with self._files.open(path, "rb", cache_type="none") as file:
                there = max(0, file.size - offset)
                file.seek(min(offset, file.size))
                return file.read(min(size, there))

        for last in (False, True):  # a body can be cut short on its way
            try:
                data = self._ask(name, get)
                check_length(name, offset, size, len(data), remedy_at(self.root))
                return data
            except FileNotFoundError:
                raise self._missing(name) from None
            except SizeMismatchError:
                if last:
                    raise
        raise AssertionError

    def expect(self, ranges: Sequence[ByteRange]) -> dict[ByteRange, bytes]:
        def get(wanted: ByteRange) -> bytes | None:
            with suppress(TeachOnceError):
                return self.read_range(*wanted)
            return None

        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as threads:
            found = dict(zip(ranges, threads.map(get, ranges), strict=True))
        return {wanted: data for wanted, data in found.items() if data is not None}

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        root = self._commit
        folder = "/".join(filter(None, (root, prefix.rpartition("/")[0])))
        for path, found in self._ask(prefix, lambda: self._files.find(folder, detail=True)).items():
            name = path.removeprefix(f"{root}/")
            if name.startswith(prefix):
                yield name, found["size"]

    def fetch(self, stored: StoredObject) -> bytes:
        try:
            return super().fetch(stored)
        except ChecksumMismatchError:  # it may have happened on the way
            return super().fetch(stored)

    def fetch_all(self, wanted: Sequence[StoredObject]) -> dict[str, bytes]:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as threads:
            return dict(zip((stored.name for stored in wanted), threads.map(self.fetch, wanted), strict=True))

    def write_all(self, contents: Mapping[str, bytes]) -> NoReturn:
        self._refuse()

    def create(self, name: str, data: bytes) -> NoReturn:
        self._refuse()

    def delete(self, name: str) -> NoReturn:
        self._refuse()

    def age(self, name: str) -> NoReturn:
        """Asked only of what may be removed."""
        self._refuse()

    def sweep(self, grace: float = math.inf) -> NoReturn:
        self._refuse()

    @cached_property
    def _commit(self) -> str:
        """The root's path at the commit that its revision is now. Raises StoreAccessError: no such repository."""

        def resolve() -> str:
            place = self._files.resolve_path(self.root)
            if not hasattr(place, "repo_id"):  # a storage bucket, which has no commits
                return place.unresolve()
            found = self._files._api.repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision)
            return replace(place, revision=found.sha, _raw_revision=found.sha).unresolve()

        try:
            return self._ask("", resolve)
        except (FileNotFoundError, NotImplementedError) as error:
            raise StoreAccessError(
                f"{self.root}: no such repository or revision on the hub, or a private one that you may not read; "
                "correct the URL (hf://datasets/USER/REPO@REVISION/FOLDER), or set HF_TOKEN"
            ) from error

    def _ask(self, name: str, operation: Callable[[], Answer]) -> Answer:
        """What the hub answers. Raises our errors, and FileNotFoundError."""
        place = f"{self.root}/{name}" if name else self.root
        try:
            return operation()
        except (FileNotFoundError, NotImplementedError):
            raise
        except ValueError as error:
            raise ConfigError(f"{place}: {error}; expected hf://datasets/USER/REPO@REVISION/FOLDER") from error
        except Exception as error:  # of its HTTP library, of its own, of fsspec
            status: Any = getattr(getattr(error, "response", None), "status_code", None)
            text = " ".join(str(error).split())[:300]
            if status in (401, 403):
                raise StoreAccessError(
                    f"{place}: the hub denies access ({status}); set HF_TOKEN to a token that may read it ({text})"
                ) from error
            raise StoreUnavailableError(
                f"{place}: the hub does not answer as it should, however often it is asked ({text}); run the same "
                "command again later"
            ) from error

    def _missing(self, name: str) -> MissingObjectError:
        return MissingObjectError(f"{name}: expected an object, found none in {self.root}; {remedy_at(self.root)}")

    def _refuse(self) -> NoReturn:
        raise StoreUnsupportedError(
            f"{self.root}: hf:// is read only here; write the cache to a folder, and upload that with `hf upload`"
        )

"""Objects in an object store (s3://, gs://, az://), through obstore.

Credentials, region and endpoint are obstore's business: it takes them from the environment (AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL, GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_NAME, ...) and from the machine's own role. It repeats
what failed by 5xx, 429, a reset or a lost answer, and goes on in the middle of a body. Added here is what it cannot
know: whether a creation that lost its answer was ours, and whether a body is all that was written.
"""

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

from storage_specs.client_process import ClientProcess, in_living_process, starting
from storage_specs.errors import (
    ChecksumMismatchError,
    ConfigError,
    MissingObjectError,
    SizeMismatchError,
    StoreUnavailableError,
    StoreUnsupportedError,
)
from storage_specs.local_objects import WRITING_FOLDER
from storage_specs.objects import ByteRange, Objects
from storage_specs.store_errors import (
    beyond_the_end,
    lacks_s3_credentials,
    misconfigured,
    no_bucket,
    no_credentials,
    refusal_of,
    said,
)
from storage_specs.stored_object import StoredObject, check_length, remedy_at

Answer = TypeVar("Answer")

REQUESTS_AT_ONCE = 16
PIECE_BYTES = 16 << 20  # larger objects go in pieces: several at once, and each within the 30 s of a request
RANGES_AT_ONCE = 32  # of objects of which little is wanted: it is waiting that takes the time
NEAR_BYTES = 1 << 17  # between two ranges of an object, below which both come in one request
EXPECTED_BYTES = 64 << 20  # that are fetched before they are asked for
PAUSES = (0.1, 0.5, 2.0)  # seconds before we repeat what obstore does not: creations and deletions
RETRY: dict[str, Any] | None = None  # obstore's own: 10 times within 3 minutes, pauses growing from 0.1 to 15 s


class RemoteObjects(Objects):
    """Objects below a URL's prefix. Threads may share it; in a forked child a process of its own does the work."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError (not the URL of a bucket, no obstore), StoreAccessError (a setting is missing)."""
        parts = urlsplit(url)
        path = parts.path.removeprefix("/").removesuffix("/")
        steps = path.split("/") if path else []
        if not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment or {"", ".", ".."} & set(steps):
            raise ConfigError(
                f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}: expected "
                f"{parts.scheme}://BUCKET/PREFIX and nothing else (credentials belong into the environment)"
            )
        self.root = "/".join([f"{parts.scheme}://{parts.netloc}", *steps])
        self.client_process: ClientProcess | None = None
        self._bucket_was_there = False
        starting()
        self._client = self._open()

    def __reduce__(self) -> tuple:
        return RemoteObjects, (self.root,)

    @in_living_process
    def size(self, name: str) -> int | None:
        import obstore

        try:
            return self._ask(name, lambda: obstore.head(self._client, name)["size"])
        except FileNotFoundError:
            self._check_bucket()
            return None

    @in_living_process
    def read(self, name: str) -> bytes:
        """As long as the store says it is, too: a body can be cut short on its way."""
        size = self.size(name)
        if size is None:
            raise self._missing(name)
        return self._range(name, 0, size, size)

    @in_living_process
    def read_range(self, name: str, offset: int, size: int) -> bytes:
        return self._range(name, offset, size)

    @in_living_process
    def expect(self, ranges: Sequence[ByteRange]) -> dict[ByteRange, bytes]:
        wanted: dict[str, list[ByteRange]] = {}
        for item in _within(EXPECTED_BYTES, ranges):
            wanted.setdefault(item[0], []).append(item)
        with ThreadPoolExecutor(RANGES_AT_ONCE) as threads:
            return {item: data for found in threads.map(self._ranges, wanted.values()) for item, data in found}

    @in_living_process
    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        import obstore

        folder = prefix.rpartition("/")[0] or None  # obstore knows whole steps only
        pages: Any = None
        last: str | None = None

        def page() -> Any:
            nonlocal pages
            pages = pages or iter(obstore.list(self._client, folder, offset=last))
            try:
                return next(pages, None)
            except Exception:
                pages = None  # the next attempt goes on behind the last name
                raise

        hidden = () if prefix.startswith(WRITING_FOLDER) else f"{WRITING_FOLDER}/"
        while (found := self._ask(prefix, page, PAUSES)) is not None:
            last = found[-1]["path"]
            for item in found:
                if item["path"].startswith(prefix) and not item["path"].startswith(hidden):
                    yield item["path"], item["size"]

    @in_living_process
    def fetch(self, stored: StoredObject) -> bytes:
        return self.fetch_all([stored])[stored.name]

    @in_living_process
    def fetch_all(self, wanted: Sequence[StoredObject]) -> dict[str, bytes]:
        pieces = [piece for stored in wanted for piece in _pieces(stored)]
        found: dict[str, list[bytes]] = {stored.name: [] for stored in wanted}
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as threads:
            for piece, data in zip(pieces, threads.map(lambda piece: self._range(*piece), pieces), strict=True):
                found[piece[0]].append(data)
        return {stored.name: self._verified(stored, found.pop(stored.name)) for stored in wanted}

    @in_living_process
    def write_all(self, contents: Mapping[str, bytes]) -> None:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as threads:
            for _ in threads.map(self._put, contents, contents.values()):
                pass

    @in_living_process
    def create(self, name: str, data: bytes) -> bool:
        if not self._created(name, data):  # or it was, and the answer was lost
            return self.read(name) == data
        if self._created(name, data):  # the bytes are the same, so nothing is lost
            raise StoreUnsupportedError(
                f"{self.place}/{name}: this store overwrites what it was told only to create (If-None-Match), so two "
                "builders could ruin each other's cache; use a store with conditional writes, or build in a local "
                "folder and copy it there with other tools"
            )
        return True

    @in_living_process
    def delete(self, name: str) -> None:
        import obstore

        with suppress(FileNotFoundError):  # S3 does not say so, others do
            self._ask(name, lambda: obstore.delete(self._client, name), PAUSES)

    @in_living_process
    def age(self, name: str) -> float | None:
        """By the store's clock and ours."""
        import obstore

        try:
            written = self._ask(name, lambda: obstore.head(self._client, name)["last_modified"])
        except FileNotFoundError:
            return None
        return time.time() - written.timestamp()

    def sweep(self, grace: float = math.inf) -> None:
        """Nothing is ever half written here; parts of killed uploads are for the bucket's own lifecycle rules."""

    def _open(self) -> Any:
        try:
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError:
            raise ConfigError(
                f"{self.place}: object stores are read and written by obstore, which is not installed: "
                "pip install 'teach-once[cloud]'"
            ) from None
        if self.root.startswith("s3:") and lacks_s3_credentials():
            raise no_credentials("there is none to ask", self.root)
        try:
            return from_url(self.root, retry_config=RETRY)
        except (BaseError, ValueError) as error:
            raise misconfigured(error, self.place) from error

    def _range(self, name: str, offset: int, size: int, whole: int | None = None) -> bytes:
        """`size` bytes from `offset` on, of an object of `whole` bytes where that is known."""
        try:
            return self._range_once(name, offset, size, whole)
        except SizeMismatchError:  # of the object, or of what came through
            return self._range_once(name, offset, size, whole)

    def _range_once(self, name: str, offset: int, size: int, whole: int | None) -> bytes:
        import obstore
        from obstore.exceptions import GenericError

        def get() -> bytes:
            # an empty range cannot be asked for
            try:
                answer = obstore.get(self._client, name, options={"range": (offset, offset + size)} if size else None)
            except GenericError as error:
                if not beyond_the_end(error):
                    raise
                raise SizeMismatchError(f"{name}: nothing at the offset {offset}; {self._remedy}") from None
            there = answer.meta["size"]
            if whole is not None and there != whole:
                raise SizeMismatchError(f"{name}: expected {whole} bytes, found {there}; {self._remedy}")
            return bytes(answer.bytes()) if size else b""

        try:
            data = self._ask(name, get)
        except FileNotFoundError:
            raise self._missing(name) from None
        check_length(name, offset, size, len(data), self._remedy)
        return data

    def _ranges(self, wanted: Sequence[ByteRange]) -> Sequence[tuple[ByteRange, bytes]]:
        """Those ranges of one object that came whole, near ones in one request.

        obstore would put them together, too, but panics where the body of several is cut short.
        """
        import obstore
        from obstore.exceptions import BaseError

        (name, *_), *_ = wanted
        starts, ends = _spans(wanted)
        try:
            found = obstore.get_ranges(self._client, name, starts=starts, ends=ends, coalesce=0)
        except (BaseError, FileNotFoundError):
            return []
        came = []
        for item in wanted:
            span = bisect_right(starts, item[1]) - 1
            begin = item[1] - starts[span]
            data = bytes(memoryview(found[span])[begin : begin + item[2]])
            if len(data) == item[2]:
                came.append((item, data))
        return came

    def _verified(self, stored: StoredObject, pieces: Sequence[bytes]) -> bytes:
        data = b"".join(pieces)
        try:
            stored.check(data, self._remedy)
        except ChecksumMismatchError:  # it may have happened on the way
            data = b"".join([self._range(*piece) for piece in _pieces(stored)])
            stored.check(data, self._remedy)
        return data

    def _put(self, name: str, data: bytes) -> None:
        import obstore

        large = len(data) > PIECE_BYTES
        self._written(name, lambda: obstore.put(self._client, name, data, use_multipart=large, chunk_size=PIECE_BYTES))

    def _created(self, name: str, data: bytes) -> bool:
        """Whether the store says that it created the object; of a repeated creation it may say that it was there."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        def put() -> bool:
            try:
                obstore.put(self._client, name, data, mode="create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                if self.size(name) is None:
                    raise  # another creation is going on
                return False
            return True

        return self._written(name, put)

    def _written(self, name: str, put: Callable[[], Answer]) -> Answer:
        try:
            return self._ask(name, put, PAUSES)
        except FileNotFoundError as error:  # not of the object
            raise no_bucket(error, f"{self.place}/{name}") from error

    def _ask(self, name: str, operation: Callable[[], Answer], pauses: Sequence[float] = ()) -> Answer:
        """What the store answers, asked again after each of `pauses`. Raises our errors, and FileNotFoundError."""
        from obstore.exceptions import BaseError

        place = f"{self.place}/{name}" if name else self.place
        for pause in (*pauses, None):
            try:
                return operation()
            except (BaseError, FileNotFoundError, NotImplementedError) as error:
                refusal = refusal_of(error, place)
                if refusal is not None:
                    raise refusal from error
                if isinstance(error, FileNotFoundError):
                    raise
                if pause is None:
                    raise StoreUnavailableError(
                        f"{place}: the object store does not answer as it should, however often it is asked "
                        f"({said(error)}); what was finished is kept: run the same command again later"
                    ) from error
            time.sleep(pause)
        raise AssertionError  # the last pause is None

    def _check_bucket(self) -> None:
        """Of an object that is not there a HEAD request does not say whether at least the bucket is."""
        if not self._bucket_was_there:
            next(iter(self.list()), None)
            self._bucket_was_there = True

    @property
    def _remedy(self) -> str:
        return remedy_at(self.root)

    def _missing(self, name: str) -> MissingObjectError:
        return MissingObjectError(f"{name}: expected an object, found none in {self.place}; {self._remedy}")


def _within(most: int, ranges: Iterable[ByteRange]) -> Iterator[ByteRange]:
    """The ranges that are not empty (which cannot be asked for), until they hold `most` bytes."""
    for name, offset, size in ranges:
        most -= size
        if most < 0:
            return
        if size:
            yield name, offset, size


def _spans(ranges: Iterable[ByteRange]) -> tuple[list[int], list[int]]:
    """(starts, ends), in order, of what is asked for of one object: ranges with less than NEAR_BYTES between them."""
    starts: list[int] = []
    ends: list[int] = []
    for _, offset, size in sorted(ranges):
        if ends and offset < ends[-1] + NEAR_BYTES:
            ends[-1] = max(ends[-1], offset + size)
        else:
            starts.append(offset)
            ends.append(offset + size)
    return starts, ends


def _pieces(stored: StoredObject) -> list[tuple[str, int, int, int]]:
    """(name, offset, bytes, bytes of the whole) of the pieces in which an object is read."""
    starts = range(0, max(1, stored.size), PIECE_BYTES)
    return [(stored.name, start, min(PIECE_BYTES, stored.size - start), stored.size) for start in starts]

"""Object stores: S3 (moto) and a small Google server on loopback, through a proxy that breaks answers on purpose.

obstore repeats by itself what fails; what is tested is that right bytes or a typed error come out, never half of it.
"""

import multiprocessing
import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from faulty_proxy import FaultyProxy
from gcs_server import GcsServer, credentials
from object_stores import S3
from objects_contract import check_cache, check_objects

from storage_specs import remote_objects, store_errors
from storage_specs.errors import (
    ChecksumMismatchError,
    ConfigError,
    CorruptCacheError,
    MissingObjectError,
    SizeMismatchError,
    StoreAccessError,
    StoreUnavailableError,
    StoreUnsupportedError,
)
from storage_specs.local_objects import LocalObjects
from storage_specs.object_roots import open_objects
from storage_specs.stored_object import StoredObject

DATA = np.random.default_rng(0).bytes(100_000)
ALWAYS = 10_000


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few retries within milliseconds, in this process."""
    backoff = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=4), "base": 2}
    monkeypatch.setattr(
        remote_objects, "RETRY", {"max_retries": 3, "backoff": backoff, "retry_timeout": timedelta(seconds=20)}
    )
    monkeypatch.setattr(remote_objects, "PAUSES", (0.001, 0.001))


def test_a_bucket_and_a_folder_mean_the_same(s3: S3, tmp_path: Path) -> None:
    check_objects(LocalObjects(tmp_path / "cache"))
    objects = open_objects(f"{s3.url}/some/where/")
    check_objects(objects)
    assert objects.size("shards") is None
    assert open_objects(f"{s3.url}/some").read("where/plan.json") == b"{}"
    assert objects.root == objects.place == f"{s3.url}/some/where"


@pytest.fixture
def gcs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    server = GcsServer()
    proxy = FaultyProxy(server.address)
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(credentials(tmp_path / "account.json", proxy.url)))
    monkeypatch.setenv("GOOGLE_ALLOW_HTTP", "true")
    yield proxy
    proxy.stop()
    server.stop()


def test_google_means_the_same(gcs: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_objects(open_objects("gs://caches/some/where"))
    for fault in (500, "lose", "reset", "truncate"):
        gcs.fail(fault, method="GET", path="shards")
    for fault in (503, "lose", "refuse"):
        gcs.fail(fault, method="PUT", path="shards")
    check_cache("gs://caches/small", tmp_path, "arrow")
    assert not [fault for fault in gcs.faults if fault.times]
    monkeypatch.setattr(remote_objects, "PIECE_BYTES", 5 << 20)
    objects = open_objects("gs://caches/large")
    data = np.random.default_rng(1).bytes(11 << 20)
    objects.write_all({"big": data})
    assert gcs.count("PUT", "big.*partNumber") == 3
    assert objects.fetch(StoredObject.of("big", data)) == data
    nowhere = open_objects("gs://nowhere/x")
    for ask in (lambda: nowhere.size("a"), lambda: nowhere.read("a"), lambda: nowhere.create("a", b"")):
        with pytest.raises(StoreAccessError, match=r"^gs://nowhere/x.*no such bucket"):
            ask()


def test_damage_is_told_apart(s3: S3) -> None:
    objects, stored = open_objects(f"{s3.url}/x"), StoredObject.of("a", DATA)
    for data, error in ((None, MissingObjectError), (DATA[1:], SizeMismatchError), (DATA[::-1], ChecksumMismatchError)):
        objects.delete("a") if data is None else objects.write_all({"a": data})
        with pytest.raises(error):
            objects.fetch(stored)


def test_large_objects_go_in_pieces(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_objects, "PIECE_BYTES", 5 << 20)  # the least that S3 takes as a part
    objects = open_objects(s3.url)
    data = np.random.default_rng(1).bytes((12 << 20) + 1)
    objects.write_all({"big": data, "small": DATA})
    assert s3.proxy.count("PUT", "big.*partNumber") == 3
    s3.proxy.fail("reset", path="big", times=2)
    wanted = [StoredObject.of("big", data), StoredObject.of("small", DATA)]
    assert objects.fetch_all(wanted) == {"big": data, "small": DATA}
    assert s3.proxy.count("GET", "big") == 5
    objects.write_all({"big": data[:-1] + b"?"})
    with pytest.raises(ChecksumMismatchError, match="big: expected crc32c"):
        objects.fetch_all(wanted)


def test_many_objects_are_asked_for_at_once(s3: S3) -> None:
    contents = {f"shards/{number}": b"%d" % number * 100 for number in range(40)}
    objects = open_objects(s3.url)
    objects.write_all(contents)
    wanted = [StoredObject.of(name, data) for name, data in contents.items()]
    s3.proxy.most_at_once, s3.proxy.gather = 0, 9
    s3.proxy.fail("slow", times=ALWAYS)
    assert objects.fetch_all(wanted) == contents
    assert 8 < s3.proxy.most_at_once <= remote_objects.REQUESTS_AT_ONCE
    s3.proxy.heal()
    wanted[7] = StoredObject.of("shards/7", b"other bytes")
    with pytest.raises(SizeMismatchError, match="shards/7"):
        objects.fetch_all(wanted)


def test_near_ranges_come_in_one_request_and_only_whole_ones(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the body that holds several is cut short between them."""
    monkeypatch.setattr(remote_objects, "NEAR_BYTES", 1000)
    objects = open_objects(s3.url)
    objects.write_all({"a": DATA})
    ranges = [("a", 900, 50), ("a", 0, 100), ("a", 1900, 10), ("a", 5000, 10), ("a", 20, 1000)]
    expected = {item: DATA[item[1] : item[1] + item[2]] for item in ranges}
    s3.proxy.requests.clear()
    assert objects.expect(ranges) == expected
    assert s3.proxy.count("GET") == 2  # 0 to 1910, and 5000 to 5010
    s3.proxy.fail("truncate", times=2)
    assert objects.expect(ranges) == {item: expected[item] for item in ranges[:2]}


@pytest.mark.parametrize("fault", [500, 503, 429, "lose", "refuse", "reset", "truncate", "garble"])
def test_a_fault_that_passes_is_not_seen(s3: S3, fault: str | int) -> None:
    objects = open_objects(f"{s3.url}/x")
    objects.write_all({"a": DATA})
    s3.proxy.fail(fault, method="GET")
    assert objects.fetch(StoredObject.of("a", DATA)) == DATA
    s3.proxy.fail(fault, method="GET")
    assert objects.read("a") == DATA if fault != "garble" else len(objects.read("a")) == len(DATA)
    if fault != "garble":  # which could be any name
        s3.proxy.fail(fault, method="GET", path="list-type")
        assert list(objects.list()) == [("a", len(DATA))]
        assert not [left for left in s3.proxy.faults if left.times]
    if fault in ("reset", "truncate", "garble"):
        return
    for method, ask in {
        "HEAD": lambda: objects.size("a") == len(DATA),
        "PUT": lambda: objects.write_all({"a": DATA, "b": DATA}) is None,
        "GET": lambda: sorted(objects.list()) == [("a", len(DATA)), ("b", len(DATA))],
        "POST|DELETE": lambda: objects.delete("b") is None and objects.size("b") is None,
    }.items():
        s3.proxy.fail(fault, method=method)
        assert ask(), method
        assert not [left for left in s3.proxy.faults if left.times], method


@pytest.mark.parametrize("fault", [500, "lose", "refuse", "reset", "truncate", "garble"])
def test_a_fault_that_stays_is_a_typed_error(s3: S3, fault: str | int) -> None:
    objects = open_objects(f"{s3.url}/x")
    objects.write_all({"a": DATA})
    s3.proxy.fail(fault, method="GET", times=ALWAYS)
    wrong = {"truncate": SizeMismatchError, "garble": ChecksumMismatchError}.get(fault, StoreUnavailableError)
    with pytest.raises(wrong) as caught:
        objects.fetch(StoredObject.of("a", DATA))
    if wrong is StoreUnavailableError:
        assert "\n" not in str(caught.value)
        assert "s3://" in str(caught.value)
        assert "run the same command again later" in str(caught.value)
        s3.proxy.fail(fault, times=ALWAYS)
        for ask in (lambda: objects.write_all({"b": DATA}), lambda: objects.create("b", DATA)):
            if fault != "reset":
                with pytest.raises(StoreUnavailableError):
                    ask()
    s3.proxy.heal()
    assert objects.fetch(StoredObject.of("a", DATA)) == DATA


@pytest.mark.parametrize("fault", [500, 409, "lose", "refuse"])
def test_a_creation_that_lost_its_answer_knows_its_own_bytes(s3: S3, fault: str | int) -> None:
    objects = open_objects(s3.url)
    s3.proxy.fail(fault, method="PUT")
    assert objects.create("manifest.json", DATA)
    assert objects.read("manifest.json") == DATA
    s3.proxy.fail(fault, method="PUT")
    assert not objects.create("manifest.json", DATA[::-1])
    assert objects.read("manifest.json") == DATA


def test_of_many_creators_one_wins(s3: S3, tmp_path: Path) -> None:
    for place in (s3.url, tmp_path):
        with ThreadPoolExecutor(8) as threads:
            won = list(threads.map(lambda n, place=place: open_objects(place).create("x", b"%d" % n), range(8)))
        assert sum(won) == 1
        assert open_objects(place).read("x") == b"%d" % won.index(True)


def test_a_long_listing_goes_on_where_it_broke(s3: S3) -> None:
    names = [f"shards/{number:06d}" for number in range(1500)]  # S3 lists 1000 a page
    objects = open_objects(f"{s3.url}/x")
    objects.write_all(dict.fromkeys(names, b""))
    listing = objects.list("shards/0")
    found = [next(listing)]
    s3.proxy.fail("reset", method="GET", path="list-type", times=2)
    found += listing
    assert sorted(found) == [(name, 0) for name in names]
    assert s3.proxy.count("GET", "list-type") >= 4


def test_stores_without_conditional_creation_are_refused(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("AWS_CONDITIONAL_PUT", "disabled")
        with pytest.raises(StoreUnsupportedError, match=r"two builders could ruin each other's cache"):
            open_objects(s3.url).create("x", b"1")
    s3.proxy.drop_headers = {"if-none-match"}  # a store that does not know the header, and says nothing
    with pytest.raises(StoreUnsupportedError, match=r"overwrites what it was told only to create \(If-None-Match\)"):
        open_objects(s3.url).create("x", b"1")


def test_refusals_are_one_line(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = open_objects("s3://no-such-bucket-here/x")
    for ask in (lambda: nowhere.size("a"), lambda: nowhere.read("a"), lambda: nowhere.create("a", b"")):
        with pytest.raises(StoreAccessError, match=r"^s3://no-such-bucket-here/x.*no such bucket .*create it, or"):
            ask()
    objects = open_objects(f"{s3.url}/x")
    refusals = {401: "access denied", 403: "access denied .* check the credentials", 301: "region", 400: "AWS_REGION"}
    for status, words in refusals.items():
        s3.proxy.fail(status, times=ALWAYS)
        for ask in (lambda: objects.size("a"), lambda: objects.create("a", b""), lambda: next(objects.list())):
            with pytest.raises(StoreAccessError, match=f"^[^\n]*{words}[^\n]*$"):
                ask()
        s3.proxy.heal()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setattr(store_errors, "ROLE_ADDRESS", ("127.0.0.1", 9))
    with pytest.raises(StoreAccessError, match=r"no credentials in the environment.*aws configure export-credentials"):
        open_objects(s3.url)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"{s3.proxy.url}/metadata/identity")
    s3.proxy.fail(404, path="metadata", times=ALWAYS)
    with pytest.raises(StoreAccessError, match=r"no credentials in the environment.*AWS_ACCESS_KEY_ID"):
        open_objects(s3.url).read("a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    with pytest.raises(StoreUnavailableError, match="the object store does not answer"):
        open_objects(s3.url).read("a")


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///x", "s3://b/../x", "s3://b//x", "s3://key:secret@b/x", "s3://b/x?versionId=1", "s3://b/x#y"]
)
def test_urls_that_are_no_place_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="expected s3://BUCKET/PREFIX and nothing else") as caught:
        open_objects(url)
    assert "secret" not in str(caught.value)


def test_schemes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for url in ("ftp://host/x", "http://host/x", "S3://bucket/x", "memory://"):
        with pytest.raises(ConfigError, match=r":// is none of s3://, gs://, az://, hf://"):
            open_objects(url)
    with pytest.raises(ConfigError, match="went through pathlib"):
        open_objects(Path("s3://bucket/x"))
    assert isinstance(open_objects(tmp_path), LocalObjects)
    assert isinstance(open_objects(f"{tmp_path}/s3"), LocalObjects)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(StoreAccessError, match=r"Account must be specified.*AZURE_STORAGE_ACCOUNT_NAME"):
        open_objects("az://container/x")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert open_objects("az://container/x").root == "az://container/x"
    assert open_objects("gs://bucket/x/y").root == "gs://bucket/x/y"


def test_without_obstore_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(ConfigError, match=r"pip install 'teach-once\[cloud\]'"):
        open_objects("s3://bucket/x")


def _read_twice(objects: remote_objects.RemoteObjects, answers: object) -> None:
    try:
        objects.read("none")
    except CorruptCacheError as error:
        missing = type(error).__name__
    read = objects.fetch(StoredObject.of("a", DATA)) == DATA == objects.read("a")
    answers.put((os.getpid(), read, missing, list(objects.list()), open_objects(objects.root).size("a")))


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # that is the point of it
def test_another_process_reads_on(s3: S3, start: str) -> None:
    """Also forked, where obstore itself would wait for ever."""
    objects = open_objects(s3.url)
    objects.write_all({"a": DATA})
    processes = multiprocessing.get_context(start)
    answers = processes.Queue()
    children = [processes.Process(target=_read_twice, args=(objects, answers), daemon=True) for _ in range(2)]
    for child in children:
        child.start()
    found = [answers.get(timeout=240) for _ in children]
    for child in children:
        child.join(240)
        assert child.exitcode == 0
        child.close()
    answers.close()
    answers.join_thread()
    assert {pid for pid, *_ in found}.isdisjoint({os.getpid()})
    assert [rest for _, *rest in found] == [[True, "MissingObjectError", [("a", len(DATA))], len(DATA)]] * 2
    assert objects.read("a") == DATA  # and here it goes on


def test_threads_share_it(s3: S3) -> None:
    objects = open_objects(s3.url)
    objects.write_all({"a": DATA})
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(lambda _: objects.fetch(StoredObject.of("a", DATA)) == DATA, range(40)))


def test_a_pickle_holds_the_url_alone(s3: S3) -> None:
    objects = open_objects(f"{s3.url}/x")
    objects.write_all({"a": DATA})
    pickled = pickle.dumps(objects)
    assert b"AWS" not in pickled
    assert pickle.loads(pickled).read("a") == DATA

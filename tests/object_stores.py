"""A bucket on moto's S3 server behind a faulty proxy, for the fixtures `moto_address` and `s3`."""

import logging
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from faulty_proxy import FaultyProxy

from storage_specs.object_roots import open_objects


class S3(NamedTuple):
    """A bucket's URL, and the proxy between it and the code under test."""

    url: str
    proxy: FaultyProxy

    @property
    def environment(self) -> dict[str, str]:
        """Where obstore finds it."""
        return {
            "AWS_ENDPOINT_URL": self.proxy.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }


@contextmanager
def moto_server() -> Iterator[tuple[str, int]]:
    """Host and port of a server, on a free port of loopback."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()
    finally:
        server.stop()


@contextmanager
def new_bucket(address: tuple[str, int]) -> Iterator[S3]:
    """An empty bucket, and a proxy of its own."""
    proxy = FaultyProxy(address)
    try:
        bucket = f"bucket-{uuid.uuid4().hex}"
        with urllib.request.urlopen(urllib.request.Request(f"{proxy.url}/{bucket}", method="PUT")) as answer:
            assert answer.status == 200
        proxy.requests.clear()
        yield S3(f"s3://{bucket}", proxy)
    finally:
        proxy.stop()


def objects_of(place: str) -> dict[str, bytes]:
    """Every object below a place: {name: bytes}."""
    objects = open_objects(place)
    names = [name for name, _ in objects.list()]
    with ThreadPoolExecutor(8) as threads:
        return dict(zip(names, threads.map(objects.read, names), strict=True))

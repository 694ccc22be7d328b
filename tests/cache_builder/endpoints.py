"""A fault-injecting OpenAI-compatible endpoint on loopback, for tests: every request is answered by the next script."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """One answer. body: JSON, or bytes as they are. drop: hang up without one. seconds: keep silent before."""

    status: int = 200
    body: Any = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    seconds: float = 0


@dataclass
class Endpoint:
    """base_url, and what was asked: (path, headers, JSON) in the order of arrival."""

    base_url: str
    requests: list[tuple[str, dict[str, str], Any]]


class _Server(ThreadingHTTPServer):
    """Says nothing of clients that are gone before they have their answer: they may do so."""

    request_queue_size = 128  # many ask at once, and one that finds the queue full tries again after a second

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@contextmanager
def endpoint(answer: Callable[[str, Any, int], Answer]) -> Iterator[Endpoint]:
    """`answer(path, body, number of requests before)` decides, in threads."""
    requests: list[tuple[str, dict[str, str], Any]] = []
    lock, closing = threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                number = len(requests)
                requests.append((self.path, dict(self.headers), body))
            reply = answer(self.path, body, number)
            closing.wait(reply.seconds)
            if reply.drop or closing.is_set():
                return
            data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = _Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Endpoint(f"http://127.0.0.1:{server.server_port}/v1", requests)
    finally:
        closing.set()
        server.shutdown()
        thread.join()
        server.server_close()

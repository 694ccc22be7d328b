"""A loopback HTTP proxy that breaks answers on purpose: what networks and object stores do on bad days.

Faults, each for the next `times` requests that match: an int = that status instead of asking the server; `lose` = the
server does it, the connection dies before the answer; `reset` = the connection dies in the middle of the body;
`truncate` = a body cut short under an honest-looking Content-Length; `garble` = one flipped bit in the body; `slow` =
half a second before the answer; `refuse` = the connection dies before the server is asked; `hang` = the same, but only
once the proxy heals.
"""

import http.client
import re
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLOW_SECONDS = 0.5
PATIENCE = 120.0  # seconds for what must come
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "server", "date"}


@dataclass
class Fault:
    kind: str | int
    method: str
    path: str
    times: int
    skip: int
    over: threading.Event = field(default_factory=threading.Event)


class FaultyProxy:
    """Listens on a port of its own before `upstream` (host, port). `requests` counts (method, path) of all.

    delay_seconds: before every answer, as a store far away has it. gather: no request is answered before so many have
    been under way at once.
    """

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.upstream = upstream
        self.faults: list[Fault] = []
        self.requests: Counter[tuple[str, str]] = Counter()
        self.drop_headers: set[str] = set()  # of requests, in lower case
        self.delay_seconds = 0.0
        self.connections: set[socket.socket] = set()  # open ones
        self.at_once = self.most_at_once = self.gather = 0
        self.lock = threading.Lock()
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self.server.proxy = self
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def fail(self, kind: str | int, *, method: str = ".*", path: str = ".*", times: int = 1, skip: int = 0) -> None:
        """Break the next `times` requests, after `skip` others, whose method and path (with its query) match."""
        self.faults.append(Fault(kind, method, path, times, skip))

    def heal(self) -> None:
        with self.lock:
            for fault in self.faults:
                fault.over.set()
            self.faults.clear()

    def count(self, method: str, path: str = ".*") -> int:
        """How many requests of that method matched so far."""
        with self.lock:  # others come in while we count
            return sum(n for (verb, where), n in self.requests.items() if verb == method and re.search(path, where))

    def fault_of(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.requests[method, path] += 1
            for fault in self.faults:
                if fault.times > 0 and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def wait_for_others(self) -> None:
        """Those of `gather`; less than a client's patience, which is 30 seconds."""
        deadline = time.monotonic() + 25
        while self.most_at_once < self.gather and time.monotonic() < deadline:
            time.sleep(0.002)

    def settle(self, others: set[socket.socket]) -> None:
        """Wait until every connection but `others` is at its end: a killed client's last requests still arrive.

        One request of our own comes first: whatever a dead client had in the queue before it is accepted by then.
        """
        probe = http.client.HTTPConnection(*self.server.server_address[:2])
        probe.request("GET", "/")
        probe.getresponse().read()
        probe.close()
        deadline = time.monotonic() + PATIENCE
        while self.connections - others:
            assert time.monotonic() < deadline, f"still open: {self.connections - others}"
            time.sleep(0.005)

    def stop(self) -> None:
        self.heal()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class _Server(ThreadingHTTPServer):
    proxy: FaultyProxy
    daemon_threads = True
    request_queue_size = 128

    def process_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:
        self.proxy.connections.add(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: socket.socket, client_address: tuple[str, int]) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.proxy.connections.discard(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is none of ours."""


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultyProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer is several writes; waiting for ACKs between them costs 40 ms

    def do_GET(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        broken = self.proxy.fault_of(self.command, self.path)
        fault = None if broken is None else broken.kind
        if isinstance(fault, int):
            self._answer(fault, {}, b"<Error><Code>Injected</Code></Error>")
        elif broken is not None and fault in ("refuse", "hang"):
            if fault == "hang":
                broken.over.wait()
            self._reset()
        else:
            with self.proxy.lock:
                self.proxy.at_once += 1
                self.proxy.most_at_once = max(self.proxy.most_at_once, self.proxy.at_once)
            try:
                self.proxy.wait_for_others()
                time.sleep(SLOW_SECONDS if fault == "slow" else self.proxy.delay_seconds)
                status, headers, body = self._ask(sent)
            finally:
                with self.proxy.lock:
                    self.proxy.at_once -= 1
            if fault == "lose":
                self._reset()
            else:
                self._answer(status, headers, body, fault)

    do_PUT = do_HEAD = do_POST = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def _ask(self, sent: bytes) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection(*self.proxy.upstream)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in self.proxy.drop_headers}
            upstream.request(self.command, self.path, sent, headers)
            answer = upstream.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            upstream.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes, fault: str | None = None) -> None:
        half = len(body) // 2
        if fault == "garble":
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        elif fault == "truncate":
            body = body[:half]
        length = next((value for name, value in headers.items() if name.lower() == "content-length"), None)
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body[:half] if fault == "reset" else body)
        if fault == "reset":
            self._reset()

    def _reset(self) -> None:
        """Close with RST, as a dying server or a middlebox does."""
        self.wfile.flush()
        time.sleep(0.02)  # what was sent arrives first
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

"""A loopback server that speaks as much of Google Cloud Storage's XML interface as obstore's client asks for."""

import itertools
import json
import re
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class GcsServer:
    """One bucket, `caches`. `credentials(file)` writes what GOOGLE_SERVICE_ACCOUNT is to name."""

    def __init__(self) -> None:
        state = {"objects": {}, "parts": {}, "lock": threading.Lock(), "numbers": itertools.count()}
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), state))
        self.address = self.server.server_address[:2]
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def credentials(file: Path, url: str) -> Path:
    account = {"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    file.write_text(json.dumps(account))
    return file


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class _Handler(BaseHTTPRequestHandler):
    objects: dict[str, bytes]
    parts: dict[str, dict[int, bytes]]
    lock: threading.Lock
    numbers: itertools.count
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer is several writes; waiting for ACKs between them costs 40 ms

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
        bucket, _, name = unquote(address.path).removeprefix("/").partition("/")
        with self.lock:
            if bucket != "caches":
                self._answer(404, b"<Error><Message>The specified bucket does not exist.</Message></Error>")
            elif not name:
                self._list(query["prefix"])
            elif self.command == "PUT" and "uploadId" in query:
                self.parts[query["uploadId"]][int(query["partNumber"])] = body
                self._answer(200, b"", {"ETag": f'"{query["partNumber"]}"'})
            elif self.command == "PUT":
                self._put(name, body)
            elif self.command == "POST":
                self._multipart(name, query)
            elif name not in self.objects:
                self._answer(404, b"<Error><Message>The specified key does not exist.</Message></Error>")
            elif self.command == "DELETE":
                del self.objects[name]
                self._answer(204, b"")
            else:
                self._read(self.objects[name])

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def _list(self, prefix: str) -> None:
        entries = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{len(data)}</Size><ETag>x</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for name, data in self.objects.items()
            if name.startswith(prefix)
        )
        self._answer(200, f"<ListBucketResult>{entries}</ListBucketResult>".encode())

    def _put(self, name: str, body: bytes) -> None:
        if self.headers.get("x-goog-if-generation-match") == "0" and name in self.objects:
            self._answer(412, b"<Error><Message>A precondition failed.</Message></Error>")
        else:
            self.objects[name] = body
            self._answer(200, b"", {"ETag": '"x"'})

    def _multipart(self, name: str, query: dict[str, str]) -> None:
        if "uploads" in query:
            upload = str(next(self.numbers))
            self.parts[upload] = {}
            text = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
        else:
            self.objects[name] = b"".join(data for _, data in sorted(self.parts.pop(query["uploadId"]).items()))
            text = "<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"
        self._answer(200, text.encode())

    def _read(self, data: bytes) -> None:
        headers = {"ETag": '"x"', "Last-Modified": formatdate(usegmt=True)}  # all of it was written just now
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not wanted:
            return self._answer(200, data, headers)
        start, end = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        if start > end:
            return self._answer(416, b"<Error><Message>The requested range cannot be satisfied.</Message></Error>")
        return self._answer(206, data[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

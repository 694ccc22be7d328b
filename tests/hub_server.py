"""A loopback server that speaks as much of the Hugging Face hub's HTTP interface as reading a dataset takes."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves the files below `folder` as the dataset `user/caches`, whose only branch, main, is at COMMIT."""

    def __init__(self, folder: Path) -> None:
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"folder": folder}))
        self.address = self.server.server_address[:2]
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer is several writes; waiting for ACKs between them costs 40 ms

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        found = re.fullmatch(r"/(api/)?datasets/user/caches(?:/([a-z-]+)/([^/]+)(?:/(.*))?)?", path)
        if not found or found[3] not in (None, "main", COMMIT):
            kind = "RepoNotFound" if not found else "RevisionNotFound"
            return self._answer(404, b"{}", {"X-Error-Code": kind})
        api, verb, _, name = found.groups()
        if api and verb in (None, "revision"):
            return self._json({"id": "user/caches", "sha": COMMIT, "private": False, "siblings": [], "tags": []})
        if api and verb == "paths-info":
            asked = json.loads(body)["paths"]
            return self._json([self._entry(self.folder / path) for path in asked if (self.folder / path).exists()])
        if api and verb == "tree":
            start = self.folder / (name or "")
            if not start.is_dir():
                return self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            found = start.rglob("*") if "recursive=true" in self.path.lower() else start.iterdir()
            return self._json([self._entry(file) for file in sorted(found)])
        if verb == "resolve" and (self.folder / name).is_file():
            return self._file((self.folder / name).read_bytes())
        return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_POST = do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def _entry(self, file: Path) -> dict:
        path = file.relative_to(self.folder).as_posix()
        if file.is_dir():
            return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
        return {"type": "file", "path": path, "oid": "0" * 40, "size": file.stat().st_size}

    def _file(self, data: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not wanted:
            return self._answer(200, data, {"X-Repo-Commit": COMMIT, "ETag": '"x"'})
        start, end = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        return self._answer(206, data[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(data)}"})

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

"""What child processes print to standard error: passed on as it comes, and kept, as only there they say why they end.

A pipe would stop them where nobody empties it in time; this is a file in memory (Linux), and elsewhere nothing is kept.
"""

import os
import sys
import threading
from types import TracebackType

POLL_SECONDS = 0.1
KEPT_BYTES = 1 << 16


class ChildErrors:
    """Inside a `with` block standard error is a file in memory; children started there keep it for all their life.

    What comes into it is passed on until `close`, which a block that an exception leaves calls, too.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("stderr", 0) if hasattr(os, "memfd_create") else None
        self._passed_on = 0
        self._closed = threading.Event()

    def __enter__(self) -> "ChildErrors":
        if self._file is not None:
            sys.stderr.flush()
            self._real = os.dup(2)
            os.dup2(self._file, 2)
            self._thread = threading.Thread(target=self._pass_on, name="child-errors", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._file is not None:
            sys.stderr.flush()
            os.dup2(self._real, 2)
        if kind is not None:
            self.close()

    def text(self) -> str:
        """The end of what was printed so far."""
        if self._file is None or self._closed.is_set():
            return ""
        size = os.fstat(self._file).st_size
        return os.pread(self._file, KEPT_BYTES, max(0, size - KEPT_BYTES)).decode(errors="replace")

    def close(self) -> None:
        """Pass the rest on, and keep nothing any longer. What children print after that is lost."""
        if self._file is not None and not self._closed.is_set():
            self._closed.set()
            self._thread.join()
            os.close(self._file)
            os.close(self._real)

    def _pass_on(self) -> None:
        while True:
            last = self._closed.wait(POLL_SECONDS)
            while data := os.pread(self._file, KEPT_BYTES, self._passed_on):
                self._passed_on += len(data)
                while data:
                    data = data[os.write(self._real, data) :]
            if last:
                return

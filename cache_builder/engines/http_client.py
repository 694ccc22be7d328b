"""Requests to an OpenAI-compatible endpoint that outlive its bad moments: time-outs, 429s and 5xx are tried again.

The key comes from the environment and goes into one header; it is cut out of whatever an endpoint says before anybody
sees that.
"""

import email.utils
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from storage_specs.errors import ConfigError, EngineError

DEFAULT_KEY = "OPENAI_API_KEY"
TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
ATTEMPTS = 8
LONGEST_WAIT = 60.0  # seconds between two attempts, where the endpoint names no time
LONGEST_RETRY_AFTER = 600.0  # more than that is no passing trouble


class HttpClient:
    """POSTs JSON; threads may share it. base_url: up to and with /v1. key_name: the environment variable of the key.

    Raises ConfigError for an address that is none, and for a named key that is not set.
    """

    def __init__(self, base_url: str, key_name: str | None, timeout: float) -> None:
        try:
            parts = urlsplit(base_url)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # brackets that do not match, a port that is no number or above 65535
            good = False
        if not good or not base_url.isprintable() or " " in base_url:
            raise ConfigError("base_url must be an address such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError(
                f"base_url holds credentials or a query, which would be kept in shells and logs: put the key into the "
                f"environment variable {key_name or DEFAULT_KEY}"
            )
        self.key = os.environ.get(key_name or DEFAULT_KEY, "").strip() or None  # files of keys end with a line break
        if key_name and not self.key:
            raise ConfigError(f"api_key_env names {key_name}, but no such environment variable is set")
        if self.key and not (self.key.isascii() and self.key.isprintable()):  # refused by httpx, which would print it
            raise ConfigError(
                f"the key in the environment variable {key_name or DEFAULT_KEY} holds characters that no header may "
                "hold: only printable ASCII can be a key"
            )
        try:
            import httpx
        except ImportError as error:
            raise EngineError(f"the server engine needs httpx ({error}): pip install '.[server]'") from None
        self._errors = httpx.RequestError
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        self._client = httpx.Client(base_url=base_url.rstrip("/") + "/", headers=headers, timeout=timeout)
        self._stopped = threading.Event()
        self._under_way, self._counting = 0, threading.Lock()
        self.sleep: Callable[[float], Any] = self._stopped.wait

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer's JSON object. Raises EngineError once trying again is hopeless."""
        with self._counted():
            return self._post(path, body)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        for attempt in range(ATTEMPTS):
            wait: float | None = None
            try:
                answer = self._client.post(path, json=body)
                if answer.status_code == 200:
                    value = answer.json()
                    if isinstance(value, dict):
                        return value
                    problem = "an answer that is no JSON object"
                else:
                    problem = f"status {answer.status_code}: {self._said(answer)}"
                    if answer.status_code not in TRY_AGAIN:
                        raise EngineError(f"the endpoint refused a request to {path}: {problem}")
                    wait = retry_after(answer.headers.get("retry-after"))
            except self._errors as error:
                problem = f"{type(error).__name__}: {self.without_key(str(error))}"
            except (ValueError, RecursionError):
                problem = "an answer that is not JSON"
            if wait is not None and wait > LONGEST_RETRY_AFTER:
                raise EngineError(
                    f"the endpoint asks to wait {wait:.0f} s ({problem}): run the same command again later"
                )
            if self._stopped.is_set():
                break
            if attempt < ATTEMPTS - 1:
                self.sleep(backoff(attempt) if wait is None else wait)
        raise EngineError(
            f"the endpoint failed {ATTEMPTS} times in a row, at last with {problem}; finished shards are kept: run the "
            "same command again"
        )

    def close(self) -> None:
        """End waiting requests' patience; those under way are not cut off, and the last of them closes connections."""
        self._stopped.set()
        with self._counting:
            if not self._under_way:
                self._client.close()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._counting:
            self._under_way += 1
        try:
            yield
        finally:
            with self._counting:
                self._under_way -= 1
                if self._stopped.is_set() and not self._under_way:
                    self._client.close()

    def _said(self, answer: Any) -> str:
        try:
            error = answer.json()
            error = error.get("error", error)
            said = error.get("message", error) if isinstance(error, dict) else error
        except (ValueError, AttributeError):
            said = answer.text
        return self.without_key(" ".join(str(said).split()))[:300]

    def without_key(self, text: str) -> str:
        """What an endpoint said, as anybody may see it."""
        return text.replace(self.key, "***") if self.key else text


def backoff(attempt: int) -> float:
    """Seconds before the next attempt: doubling from half a second, each time between half of that and all of it."""
    return min(LONGEST_WAIT, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date (RFC 9110, 10.2.3); None for anything else."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None

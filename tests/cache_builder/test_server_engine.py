"""The server engine against endpoints that fail in every way: retries, refusals, and keys that never leak."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from endpoints import Answer, endpoint
from vllm_windows import window_of

from cache_builder.build_config import BuildConfig
from cache_builder.builder import build
from cache_builder.engines import http_client, make_generator
from cache_builder.engines.base import EngineConfig
from cache_builder.engines.generating import Prompt
from cache_builder.engines.http_client import HttpClient, backoff, retry_after
from cache_builder.engines.server import ServerEngine
from cache_builder.main import main
from cache_builder.sampling import Sampling
from storage_specs.command_line import run
from storage_specs.errors import ConfigError, EngineError
from storage_specs.reader import open_cache
from storage_specs.verification import verify_cache

KEY = "sk-very-secret-0123456789"
WORDS = ["Hello", " \U0001f600", " wörld", "!"]
K = 4


def chat_completion(tokens: list[str], finish_reason: str = "stop", end: bool = False) -> dict[str, Any]:
    """What chat/completions answers; `end`: with the end token, whose bytes are no part of the content."""
    rows = [*tokens, *(["<|im_end|>"] if end else [])]
    content = [
        {
            "token": token,
            "bytes": list(token.encode()),
            "logprob": np.log(0.4).item(),
            "top_logprobs": [
                {"token": "x", "bytes": None, "logprob": np.log(mass).item()} for mass in (0.4, 0.3, 0.1, 0.05, 0.01)
            ],
        }
        for token in rows
    ]
    choice = {
        "message": {"content": "".join(tokens)},
        "finish_reason": finish_reason,
        "logprobs": {"content": content},
    }
    return {"choices": [choice]}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(http_client, "backoff", lambda attempt: 0.01)
    records = [{"messages": [{"role": "user", "content": f"Hi {number}"}]} for number in range(5)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, records)))
    return {
        "teacher": "some-model",
        "corpus": str(tmp_path / "prompts.jsonl"),
        "output": tmp_path / "cache",
        "engine": "server",
        "mode": "generate",
        "k": K,
        "vocab_size": 1000,
        "documents_per_shard": 2,
        "max_tokens": 16,
    }


def test_a_black_box_chat_becomes_a_cache(config: dict[str, Any]) -> None:
    with endpoint(lambda path, body, number: Answer(body=chat_completion(WORDS, end=True))) as server:
        manifest = build(BuildConfig(**config, base_url=server.base_url, temperature=0.7, top_p=0.9, n=2)).manifest
    assert verify_cache(config["output"]).ok
    cache = open_cache(config["output"])
    assert len(cache) == 10
    document = cache[3]
    assert document.text == "Hi 1Hello \U0001f600 wörld!"
    assert document.metadata["generation"] == {"finish_reason": "stop", "sample": 1, "tokens": 5}
    assert [m.role for m in document.messages] == ["user", "assistant"]
    assert document.byte_start.tolist() == [4, 9, 14, 21, 22]
    assert document.byte_end.tolist() == [9, 14, 21, 22, 22]
    assert document.is_end.tolist() == [False] * 4 + [True]
    assert document.token_ids is None
    np.testing.assert_allclose(document.probs, np.tile([0.4, 0.3, 0.1, 0.05], (5, 1)), atol=2**-11)
    np.testing.assert_allclose(document.tail_mass, 0.15, atol=2**-9)
    assert manifest.k_ids == 0
    assert manifest.engine["name"] == "server"
    assert manifest.engine["returns"] == "the top 4 log-probabilities of a position, no ids"
    assert (manifest.generation["temperature"], manifest.generation["refused"]) == (0.7, 0)
    bodies = [body for _, _, body in server.requests]
    assert {path for path, _, _ in server.requests} == {"/v1/chat/completions"}
    assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers, _ in server.requests)
    assert len({body["seed"] for body in bodies}) == 10
    assert all((body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, K, 16) for body in bodies)


def test_completions_cut_by_length_by_a_stop_string_and_not_to_be_attributed(config: dict[str, Any]) -> None:
    broken = chat_completion(["a", "b"])
    broken["choices"][0]["message"]["content"] = "other text"
    stopped = chat_completion(["one", " STOP"])
    stopped["choices"][0]["message"]["content"] = "one "
    half = chat_completion(["ok", "\ufffd"], "length")
    half["choices"][0]["logprobs"]["content"][1]["bytes"] = [0xF0, 0x9F]
    answers = {"Hi 0": half, "Hi 1": stopped, "Hi 2": broken, "Hi 3": chat_completion([], "stop"), "Hi 4": broken}

    def answer(path: str, body: Any, number: int) -> Answer:
        return Answer(body=answers[body["messages"][0]["content"]])

    with endpoint(answer) as server:
        manifest = build(BuildConfig(**config, base_url=server.base_url, stop=("STOP",))).manifest
    assert verify_cache(config["output"]).ok
    documents = list(open_cache(config["output"]))
    assert [item.text[4:] for item in documents] == ["ok", "one ", "", "", ""]
    assert [item.metadata["generation"]["finish_reason"] for item in documents] == [
        "length",
        "stop",
        "refused",
        "stop",
        "refused",
    ]
    assert documents[1].metadata["generation"]["stop_reason"] == "STOP"
    assert [len(item.segment) for item in documents] == [1, 2, 0, 0, 0]
    assert not any(item.is_end.any() for item in documents)
    assert manifest.generation["refused"] == 2


def test_bad_moments_are_outlived(config: dict[str, Any]) -> None:
    faults = [
        Answer(status=500, body={"error": {"message": "boom"}}),
        Answer(status=429, headers={"Retry-After": "0.3"}),
        Answer(drop=True),
        Answer(body=b"<html>"),
        Answer(seconds=600),  # until the end
        Answer(status=503),
    ]

    def answer(path: str, body: Any, number: int) -> Answer:
        return faults[number] if number < len(faults) else Answer(body=chat_completion(WORDS))

    with endpoint(answer) as server:
        started = time.monotonic()
        build(BuildConfig(**config, base_url=server.base_url, max_concurrency=1, timeout=5))
        assert time.monotonic() - started > 5.3  # the time-out, and what Retry-After asked for
        assert len(server.requests) == 5 + len(faults)
    assert open_cache(config["output"]).manifest.counts["rows"] == 5 * len(WORDS)


@pytest.mark.parametrize(
    ("answer", "message", "requests"),
    [
        (Answer(status=401, body={"error": {"message": f"wrong key {KEY}"}}), r"status 401: wrong key \*\*\*", 1),
        (Answer(status=400, body=f"bad request {KEY}".encode()), r"status 400: bad request \*\*\*", 1),
        (Answer(status=500, body={"error": f"no luck with {KEY}"}), r"8 times in a row.*no luck with \*\*\*", 8),
        (Answer(status=429, headers={"retry-after": "4000"}), "asks to wait 4000 s", 1),
        (Answer(body={"choices": []}), "laid out differently", 1),
        (
            Answer(body={"choices": [{"message": {"content": "x"}, "logprobs": None, "finish_reason": "stop"}]}),
            "no log",
            1,
        ),
    ],
)
def test_what_cannot_be_outlived_is_one_line_without_the_key(
    config: dict[str, Any], answer: Answer, message: str, requests: int
) -> None:
    with endpoint(lambda *_: answer) as server:
        with pytest.raises(EngineError, match=message) as caught:
            build(BuildConfig(**config, base_url=server.base_url, max_concurrency=1))
        assert KEY not in str(caught.value)
        assert len(server.requests) <= 2 * requests  # one more may be under way


def test_too_few_log_probabilities_name_the_k_that_works(config: dict[str, Any]) -> None:
    with (
        endpoint(lambda *_: Answer(body=chat_completion(WORDS))) as server,
        pytest.raises(EngineError, match="returned 5 log-probabilities for a position, but k is 20: build with --k 5"),
    ):
        build(BuildConfig(**config | {"k": 20}, base_url=server.base_url))


def test_scoring_needs_prompt_logprobs(config: dict[str, Any], smollm2_path: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    scoring = config | {"mode": "score", "corpus": str(tmp_path / "a.txt"), "max_tokens": None, "vocab_size": None}
    with (
        endpoint(lambda *_: Answer(body={"choices": [{"text": "x"}]})) as server,
        pytest.raises(EngineError, match="returns no prompt_logprobs, so it cannot score texts"),
    ):
        build(BuildConfig(**scoring, base_url=server.base_url, tokenizer=str(smollm2_path)))


def test_the_key_is_nowhere_in_the_cache_and_nowhere_in_what_is_printed(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("MY_KEY", KEY)
    flags = [f"--{name}={value}" for name, value in config.items()]
    with endpoint(lambda *_: Answer(body=chat_completion(WORDS))) as server:
        flags += ["--base-url", server.base_url, "--api-key-env", "MY_KEY"]
        assert main(["build", *flags]) == 0
        assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers, _ in server.requests)
        assert main(["inspect", str(config["output"]), "--json"]) == 0
    files = [file for file in config["output"].rglob("*") if file.is_file()]
    assert len(files) > 3
    assert all(KEY.encode() not in file.read_bytes() for file in files)
    with endpoint(lambda *_: Answer(status=403, body={"error": {"message": KEY}})) as server:
        flags = [*flags, "--output", f"{config['output']}-2", "--base-url", server.base_url]
        with pytest.raises(SystemExit) as left:
            run(main, ["build", *flags])
        assert left.value.code == 2
    printed = capfd.readouterr()
    assert KEY not in printed.out + printed.err
    assert printed.err.splitlines()[-1].startswith("error: the endpoint refused a request")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_url": None}, "needs --base_url"),
        ({"base_url": "localhost:8000"}, "must be an address"),
        ({"base_url": f"http://user:{KEY}@localhost/v1"}, "holds credentials"),
        ({"base_url": f"http://localhost/v1?api_key={KEY}"}, "holds credentials or a query"),
        ({"api_key_env": "NO_SUCH_KEY"}, "api_key_env names NO_SUCH_KEY"),
        ({"vocab_size": None}, "give --vocab_size"),
        ({"k_ids": 2}, "name its --tokenizer"),
        ({"mode": "score", "max_tokens": None}, "name its --tokenizer"),
        ({"engine": "transformers"}, "base_url, vocab_size: for teachers behind an endpoint"),
        ({"engine_arguments": {"seed": 1}}, "give it to the server itself"),
        ({"timeout": 0.0}, "timeout is 0.0"),
        ({"timeout": float("inf")}, "timeout is inf"),
        ({"base_url": "http://[::1"}, "must be an address"),
        ({"base_url": "http://localhost:port/v1"}, "must be an address"),
        ({"base_url": "http://localhost:99999/v1"}, "must be an address"),
        ({"base_url": "http://local host/v1"}, "must be an address"),
        ({"profile": "sketch"}, "sketch needs all logits"),
    ],
)
def test_settings_that_cannot_be(config: dict[str, Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build(BuildConfig(**{"base_url": "http://127.0.0.1:9/v1"} | config | values))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-\u00fc-secret", "sk-secret\r\nX: y", "sk\x01secret"])
def test_keys_that_no_header_can_hold_are_refused_unseen(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY holds characters that no header may hold") as caught:
        HttpClient("http://127.0.0.1:9/v1", None, 5)
    assert "secret" not in str(caught.value)


def test_a_key_from_a_file_may_end_with_a_line_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    with endpoint(lambda *_: Answer(body={})) as server:
        client = HttpClient(server.base_url, None, 5)
        assert client.post("completions", {}) == {}
        client.close()
    assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "answer",
    [
        Answer(body=b"no gzip", headers={"content-encoding": "gzip"}),
        Answer(body=b"[" * 100_000 + b"]" * 100_000),
        Answer(body=b'{"choices": "\xff"}'),
        Answer(body=b'{"choices": [{"message"'),
    ],
)
def test_bodies_that_cannot_be_read_are_asked_for_again(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "backoff", lambda attempt: 0.001)
    with endpoint(lambda path, body, number: answer if number < 2 else Answer(body={"good": 1})) as server:
        client = HttpClient(server.base_url, None, 30)
        assert client.post("completions", {}) == {"good": 1}
        client.close()


def completion_with_ids() -> dict[str, Any]:
    """What vLLM's server answers where token ids are asked for: two tokens."""
    top = {f"token_id:{token}": np.log(mass).item() for token, mass in enumerate((0.4, 0.3, 0.1, 0.05))}
    logprobs = {"tokens": ["token_id:0", "token_id:1"], "token_logprobs": [-1.0, -1.0], "top_logprobs": [top, top]}
    return {"choices": [{"text": "ab", "finish_reason": "stop", "stop_reason": None, "logprobs": logprobs}]}


CONTENT = ("message", "content")
TOKEN = ("logprobs", "content", 0)


@pytest.mark.parametrize(
    ("with_ids", "place", "value"),
    [
        (False, CONTENT, 7),
        (False, CONTENT, "\ud800"),
        (False, ("finish_reason",), None),
        (False, ("finish_reason",), {"key": KEY}),
        (False, ("logprobs", "content"), []),
        (False, (*TOKEN, "bytes"), 10**30),
        (False, (*TOKEN, "bytes"), [300]),
        (False, (*TOKEN, "logprob"), KEY),
        (False, (*TOKEN, "logprob"), None),
        (False, (*TOKEN, "logprob"), 1.5),
        (False, (*TOKEN, "logprob"), []),
        (False, (*TOKEN, "top_logprobs", 0, "logprob"), "x"),
        (False, (*TOKEN, "top_logprobs", 0, "logprob"), None),
        (False, (*TOKEN, "top_logprobs"), None),
        (True, ("logprobs", "tokens"), ["token_id:0"]),
        (True, ("logprobs", "tokens"), []),
        (True, ("logprobs", "tokens", 0), "token_id:999999999999999999999999"),
        (True, ("logprobs", "token_logprobs"), [-1.0, -1.0, -1.0]),
        (True, ("logprobs", "top_logprobs"), [{}]),
    ],
)
def test_answers_laid_out_otherwise_are_refused(
    with_ids: bool, place: tuple[Any, ...], value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    engine = server_engine(returns_ids=with_ids)
    answer = completion_with_ids() if with_ids else chat_completion(WORDS)
    inner = answer["choices"][0]
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    monkeypatch.setattr(engine.client, "post", lambda path, body: answer)
    prompt = Prompt(ids=np.arange(3), text="Hi", turns=[{"role": "user", "content": "Hi"}], seed=0, max_tokens=9)
    with pytest.raises(EngineError) as caught:
        list(make_generator("server", engine, Sampling(), []).generate([prompt]))
    assert KEY not in str(caught.value)
    engine.close()


@pytest.mark.parametrize("positions", [7, "abc", {"a": 1}, [None, {"1": {"logprob": "x"}}], [None, {str(10**30): 5}]])
def test_prompt_logprobs_laid_out_otherwise_are_refused(positions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = server_engine(returns_ids=True)
    monkeypatch.setattr(engine.client, "post", lambda path, body: {"choices": [{"prompt_logprobs": positions}]})
    with pytest.raises(EngineError, match=r"positions for a prompt|prompt_logprobs are not the top"):
        list(engine.score([window_of([0, 1])]))
    engine.close()


def server_engine(**more: Any) -> ServerEngine:
    arguments = {"base_url": "http://127.0.0.1:9/v1"} | more
    return ServerEngine(
        EngineConfig(model="m", dtype="unknown", max_model_len=64, k=K, vocab_size=100, arguments=arguments)
    )


def test_waiting_times(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(0.25 * 2**n <= backoff(n) <= 0.5 * 2**n for n in range(5))
    assert backoff(30) <= http_client.LONGEST_WAIT
    assert retry_after("2.5") == 2.5
    assert retry_after("-1") == 0
    monkeypatch.setattr(time, "time", lambda: 1_000_000_000.0)
    assert retry_after("Sun, 09 Sep 2001 01:46:50 GMT") == 10
    assert retry_after("soon") is None
    assert retry_after(None) is None


def test_no_key_no_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with endpoint(lambda *_: Answer(body={})) as server:
        client = HttpClient(server.base_url, None, 5)
        assert client.post("completions", {}) == {}
        client.close()
    assert "Authorization" not in server.requests[0][1]


def test_what_is_under_way_ends_before_connections_are_closed() -> None:
    """A build that stops does not wait for slow answers; the last of them leaves no socket open behind."""
    closed = Event()

    def answer(path: str, body: Any, number: int) -> Answer:
        assert closed.wait(300)
        return Answer(body={"slow": True})

    with endpoint(answer) as server:
        client = HttpClient(server.base_url, None, 30)
        with ThreadPoolExecutor(2) as threads:
            slow = [threads.submit(client.post, "x", {}) for _ in range(2)]
            while len(server.requests) < 2:
                time.sleep(0.01)
            client.close()
            assert not client._client.is_closed
            closed.set()
            assert [one.result() for one in slow] == [{"slow": True}] * 2
        assert client._client.is_closed
        idle = HttpClient(server.base_url, None, 30)
        idle.close()
        assert idle._client.is_closed


def test_a_slow_answer_holds_nobody_up() -> None:
    """The first of 40 is answered when 12 others were, but never more than 15 are: AHEAD times two."""
    engine = server_engine(max_concurrency=2)
    asked, others, behind = count(), Event(), list[int]()

    def ask(number: int) -> int:
        if number == 0:
            assert others.wait(60)
            time.sleep(0.2)
            behind.append(next(asked))
        elif next(asked) == 11:
            others.set()
        return number

    assert list(engine.answers(range(40), ask)) == list(range(40))
    assert 12 <= behind[0] <= 15
    engine.close()


def test_after_an_error_nothing_more_is_asked() -> None:
    """It comes out in its turn, behind a slow answer, during which the endpoint is left alone."""
    engine = server_engine(max_concurrency=2)
    asked: list[int] = []

    def ask(number: int) -> int:
        asked.append(number)
        if number == 0:
            time.sleep(0.5)
        if number == 1:
            raise EngineError("no such model")
        return number

    answers = engine.answers(range(40), ask)
    assert next(answers) == 0
    with pytest.raises(EngineError, match="no such model"):
        next(answers)
    assert len(asked) <= 5
    engine.close()

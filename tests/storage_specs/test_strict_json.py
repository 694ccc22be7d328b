"""JSON that means two things, or more than it may, is refused."""

import json

import pytest

from storage_specs.strict_json import MAX_DEPTH, depth_exceeds, strict_json


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -1.5, 1e308, "", "naïve 日本 \n\u0001", [], {}, {"a": [{"b": [1, 2, {"c": None}]}], "": 2**80}],
)
def test_what_json_is(value: object) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert strict_json(text) == value
        assert strict_json(text.encode()) == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1, "a": 1}', "stands twice"),
        ('[{"b": {"a": 1, "c": 2, "a": 3}}]', "stands twice"),
        ("[NaN]", "NaN is no JSON"),
        ("-Infinity", "-Infinity is no JSON"),
        ("1e999", "too large"),
        ("[-1e400]", "too large"),
        ('"\\ud800"', "surrogates not allowed"),
        ('{"\\udc00": 1}', "surrogates not allowed"),
        ("[1,]", "Expecting value|Illegal trailing comma"),
        ("", "Expecting value"),
        ("1" * 5000, "4300 digits"),
        (b'"\xff"', "invalid start byte"),
    ],
)
def test_what_it_is_not(text: str | bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        strict_json(text)


@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_depth(brackets: str) -> None:
    def nested(depth: int) -> str:
        first, last = brackets
        return (first + '"a":' * (first == "{")) * (depth - 1) + brackets + last * (depth - 1)

    assert strict_json(nested(MAX_DEPTH)) is not None
    for depth in (MAX_DEPTH + 1, 900, 500_000):
        with pytest.raises(ValueError, match="nested deeper than 64"):
            strict_json(nested(depth))
    assert not depth_exceeds(1)
    assert not depth_exceeds([[1], {"a": 2}], 2)
    assert depth_exceeds([[1], {"a": [2]}], 2)


def test_wide_is_not_deep() -> None:
    assert len(strict_json("[" + ",".join(["[]"] * 300_000) + "]")) == 300_000

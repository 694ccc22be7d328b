"""Windows against an oracle that looks at one token at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_specs.errors import ConfigError
from storage_specs.rendering import TokenSequence
from storage_specs.windows import cut_windows


def sequence(scored: list[bool], prefix: int) -> TokenSequence:
    """Tokens whose ids are their places + 100, behind a prefix of negative ids."""
    count = len(scored)
    places = np.arange(count, dtype=np.int64)
    return TokenSequence(
        prefix_ids=-1 - np.arange(prefix, dtype=np.int64),
        ids=places + 100,
        segment=places // 7,
        byte_start=places * 2,
        token_start=places * 2,
        byte_end=places * 2 + 2,
        is_end=places % 5 == 4,
        scored=np.array(scored, dtype=bool),
    )


@settings(max_examples=300, deadline=None)
@given(
    scored=st.lists(st.booleans(), max_size=60) | st.integers(0, 200).map(lambda count: [True] * count),
    prefix=st.integers(0, 3),
    overlap=st.integers(1, 8),
    room=st.integers(1, 30),
)
def test_every_scored_token_has_one_row(scored: list[bool], prefix: int, overlap: int, room: int) -> None:
    tokens = sequence(scored, prefix)
    capacity = prefix + overlap + room
    windows = cut_windows(tokens, capacity, overlap)
    predictable = [place for place, wanted in enumerate(scored) if wanted and (place > 0 or prefix)]
    seen = []
    for window in windows:
        assert len(window.ids) <= capacity
        assert window.ids[:prefix].tolist() == tokens.prefix_ids.tolist()
        body = window.ids[prefix:]
        assert body.tolist() == list(range(body[0], body[0] + len(body)))
        assert len(window.target_ids) > 0
        assert window.first_row == len(seen)
        assert window.ids[window.logits_index + 1].tolist() == window.target_ids.tolist()
        assert window.logits_index.min() >= 0
        assert window.logits_index[-1] + 2 == len(window.ids), "nothing behind the last row is computed"
        for row, target in enumerate(window.target_ids.tolist()):
            place = target - 100
            context = place - (int(body[0]) - 100)
            assert context == place or context >= overlap, "a later window gives at least the overlap as context"
            for name in ("segment", "byte_start", "token_start", "byte_end", "is_end"):
                assert getattr(window, name)[row] == getattr(tokens, name)[place]
            assert window.row_in_segment[row] == sum(before // 7 == place // 7 for before in seen)
            seen.append(place)
        for name in ("ids", "logits_index", "target_ids", "segment", "byte_start", "byte_end", "row_in_segment"):
            assert getattr(window, name).dtype == np.int64
        start, stop = int(body[0]) - 100, int(body[0]) - 100 + len(body)
        assert start == 0 or len(window.ids) == capacity, "no room for context is left unused"
        first = seen[window.first_row]
        latest_start = 0 if first < capacity - prefix else first - overlap
        assert not any(stop <= place < latest_start + capacity - prefix for place in predictable), "as few as possible"
    assert seen == predictable


def test_a_short_document_is_one_window() -> None:
    (window,) = cut_windows(sequence([True] * 5, prefix=1), capacity=6, overlap=2)
    assert window.ids.tolist() == [-1, 100, 101, 102, 103, 104]
    assert window.logits_index.tolist() == [0, 1, 2, 3, 4]


def test_the_first_token_without_a_prefix_has_no_row() -> None:
    (window,) = cut_windows(sequence([True] * 3, prefix=0), capacity=9, overlap=1)
    assert window.target_ids.tolist() == [101, 102]
    assert cut_windows(sequence([True], prefix=0), capacity=9, overlap=1) == []


def test_a_long_prompt_that_is_not_scored_costs_one_window_and_fills_it() -> None:
    (window,) = cut_windows(sequence([False] * 50 + [True] * 3, prefix=1), capacity=12, overlap=4)
    assert window.ids.tolist() == [-1, *range(142, 153)]
    (window,) = cut_windows(sequence([False] * 2805 + [True] * 4, prefix=0), capacity=1024, overlap=128)
    assert (len(window.ids), len(window.target_ids), window.ids[-1]) == (1024, 4, 100 + 2808)


def test_no_rows_no_windows() -> None:
    assert cut_windows(sequence([False] * 9, prefix=1), capacity=4, overlap=1) == []
    assert cut_windows(sequence([], prefix=1), capacity=4, overlap=1) == []


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="--max-model-len"):
        cut_windows(sequence([True] * 9, prefix=2), capacity=5, overlap=3)
    with pytest.raises(ConfigError, match="overlap is 0"):
        cut_windows(sequence([True] * 9, prefix=2), capacity=5, overlap=0)

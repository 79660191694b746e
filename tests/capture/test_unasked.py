"""The usage chunk that we asked for is taken out of a stream, whatever the chunking, and nothing else is."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_guard_mw.capture.unasked import EVENT_BYTES_MAX, UnaskedUsage, is_usage_chunk


def event(data: object, newline: str = "\n") -> bytes:
    return f"data: {json.dumps(data)}{newline}{newline}".encode()


USAGE = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
#: Azure's first chunk: no choices either, but no usage.
FILTER_RESULTS = {"choices": [], "prompt_filter_results": [{"prompt_index": 0}], "usage": None}
WORD = {"choices": [{"index": 0, "delta": {"content": 'a "choices": [] "usage": {"x"'}}], "usage": None}
LAST_WITH_USAGE = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 1}}


def passed(chunks: list[bytes]) -> bytes:
    unasked = UnaskedUsage()
    return b"".join([*(unasked.feed(chunk) for chunk in chunks), unasked.rest()])


@given(
    st.lists(st.sampled_from([FILTER_RESULTS, WORD, LAST_WITH_USAGE]), max_size=5),
    st.sampled_from(["\n", "\r\n"]),
    st.lists(st.integers(min_value=0, max_value=2000), max_size=12),
)
def test_only_the_usage_chunk_is_taken_out_however_the_bytes_are_cut(
    others: list[object], newline: str, cuts: list[int]
) -> None:
    kept = b"".join(event(other, newline) for other in others)
    end = f"data: [DONE]{newline}{newline}".encode()
    stream = kept + event(USAGE, newline) + end

    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    chunks = [stream[a:b] for a, b in pairwise(edges)]

    assert passed(chunks) == kept + end


def test_whole_events_pass_in_the_chunk_they_came_in() -> None:
    unasked = UnaskedUsage()

    assert unasked.feed(event(WORD)) == event(WORD)
    assert unasked.feed(event(USAGE)) == b""
    assert unasked.feed(b"data: [DONE]\n\n") == b"data: [DONE]\n\n"


def test_a_very_long_event_is_not_held_up() -> None:
    unasked = UnaskedUsage()
    long = event({"choices": [{"delta": {"content": "x" * 2 * EVENT_BYTES_MAX}}]})

    first = unasked.feed(long[: EVENT_BYTES_MAX + 10])
    second = unasked.feed(long[EVENT_BYTES_MAX + 10 :] + event(USAGE))

    assert len(first) == EVENT_BYTES_MAX + 10
    assert first + second == long


def test_a_usage_chunk_without_its_blank_line_is_taken_out_at_the_end() -> None:
    assert passed([event(WORD), event(USAGE).rstrip()]) == event(WORD)


@pytest.mark.parametrize("data", [FILTER_RESULTS, WORD, LAST_WITH_USAGE, [], "choices", 1])
def test_other_events_are_not_taken_for_usage(data: object) -> None:
    assert not is_usage_chunk(event(data))

"""Server-sent events, cut out of bytes: what the data of each event says, in order.

Rule 1. An event ends with an empty line; CRLF, LF and CR all end a line.
Rule 2. The `data` lines of one event are joined with a line feed; comments and other fields are passed over.
Rule 3. An event that the end of the bytes cut short is given as far as it came: a provider's last event sometimes
        lacks its empty line, and a half one does no harm, since it is no JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_FIRST_FIELD = re.compile(rb"(?:data|event|id|retry)?:")
_FEEDS = re.compile(rb"\n*")
_LOOKED_AT_MAX = 512


def looks_like_events(data: bytes) -> bool:
    """Whether these bytes, without leading white space, begin as an event stream does."""
    return _FIRST_FIELD.match(data) is not None


def normal(data: bytes) -> bytes:
    """The same lines, each ended by a line feed. The functions below want them so."""
    if b"\r" in data:
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return data


def forward(data: bytes) -> Iterator[tuple[bytes, int]]:
    """The data of each event that has any, first to last, and the position behind the event."""
    at = 0
    while True:
        said_at = data.find(b"data:", at)  # comments and bare `event:` lines are passed over at the speed of a search
        if said_at < 0:
            return
        gap = data.rfind(b"\n\n", at, said_at)
        at = at if gap < 0 else gap + 2
        end = data.find(b"\n\n", said_at)
        end = len(data) if end < 0 else end
        said = _data(data[at:end])
        at = _after_feeds(data, end + 2)
        if said:
            yield said, at


def backward(data: bytes, start: int) -> Iterator[tuple[bytes, int]]:
    """The data of the events behind position `start`, last to first, and the position where each begins.

    It gives up where many say nothing, and says so with an empty one: `forward` passes over those faster.
    """
    end = len(data)
    for _ in range(_LOOKED_AT_MAX):
        if end <= start:
            return
        gap = data.rfind(b"\n\n", start, end)
        at = start if gap < 0 else gap + 2
        said = _data(data[at:end])
        end = start if gap < 0 else gap
        if said:
            yield said, at
    yield b"", end


def _after_feeds(data: bytes, at: int) -> int:
    match = _FEEDS.match(data, at)
    return match.end() if match else at


def _data(event: bytes) -> bytes:
    """What an event says; b"" if nothing (a comment, a bare `event:` line)."""
    if event.startswith(b"data:") and b"\n" not in event:
        return event[6:] if event.startswith(b"data: ") else event[5:]
    return b"\n".join(_data_lines(event)) if b"data:" in event else b""


def _data_lines(event: bytes) -> Iterator[bytes]:
    for line in event.split(b"\n"):
        if line.startswith(b"data:"):
            yield line[6:] if line.startswith(b"data: ") else line[5:]

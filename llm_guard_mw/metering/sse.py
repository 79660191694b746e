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


def looks_like_events(data: bytes) -> bool:
    """Whether these bytes, without leading white space, begin as an event stream does."""
    return _FIRST_FIELD.match(data) is not None


def split(data: bytes) -> list[bytes]:
    """The events as they stand, each with all its fields. `payload` reads one."""
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return data.split(b"\n\n")


def payload(event: bytes) -> bytes:
    """The event's data, b"" if it has none (a comment, a bare `event:` line)."""
    if event.startswith(b"data:") and b"\n" not in event:
        return event[6:] if event.startswith(b"data: ") else event[5:]
    return b"\n".join(_data_lines(event))


def _data_lines(event: bytes) -> Iterator[bytes]:
    for line in event.split(b"\n"):
        if line.startswith(b"data:"):
            yield line[6:] if line.startswith(b"data: ") else line[5:]

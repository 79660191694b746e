"""Take the usage chunk that only we asked for out of a stream again.

OpenAI's streams end with a chunk without choices that carries the usage, if `include_usage` asks for it. An app that
did not ask would index `choices[0]` there. So that one event is dropped, and nothing else is touched.

Rule 1. Whole events pass at once, in the very chunk they came in. Only the bytes of an event that is not complete
        yet wait for the rest of it, which no reader of events could use anyway.
Rule 2. What does not look like such an event after `EVENT_BYTES_MAX` passes, whatever follows.
"""

from __future__ import annotations

import re

import orjson

#: A usage chunk is some hundred bytes; a longer event is somebody's text and must not be held up.
EVENT_BYTES_MAX = 16 * 1024

_BLANK_LINE = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_DATA = re.compile(rb"^data:[ ]?(.*)$", re.MULTILINE)


class UnaskedUsage:
    """Feed it chunks, pass on what it gives back, and what `rest` gives at the end."""

    __slots__ = ("_passing", "_waiting")

    def __init__(self) -> None:
        self._waiting = b""
        self._passing = False  # in the middle of an event that is too long to be held

    def feed(self, chunk: bytes) -> bytes:
        data = self._waiting + chunk
        out: list[bytes] = []
        start = 0
        for blank in _BLANK_LINE.finditer(data):
            event = data[start : blank.end()]
            if self._passing or not is_usage_chunk(event):
                out.append(event)
            self._passing = False
            start = blank.end()
        self._waiting = data[start:]
        if self._passing or len(self._waiting) > EVENT_BYTES_MAX:
            # A CR or LF at the very end may be half of the blank line that ends this event.
            keep = len(self._waiting) - len(self._waiting.rstrip(b"\r\n"))
            cut = len(self._waiting) - keep
            out.append(self._waiting[:cut])
            self._waiting = self._waiting[cut:]
            self._passing = True
        return b"".join(out)

    def rest(self) -> bytes:
        """What is left at the end of the stream: an event without its blank line."""
        waiting, self._waiting = self._waiting, b""
        return b"" if is_usage_chunk(waiting) else waiting


def is_usage_chunk(event: bytes) -> bool:
    """Whether this is the event that `include_usage` adds: no choices, and a usage."""
    if _NO_CHOICES.search(event) is None or b'"usage"' not in event:
        return False
    try:
        data = orjson.loads(b"\n".join(line.strip() for line in _DATA.findall(event)))
    except ValueError:
        return False
    return isinstance(data, dict) and data.get("choices") == [] and isinstance(data.get("usage"), dict)

"""AWS event streams: frames of bytes, each with a length, headers, a payload and two checksums.

    4 length of the frame · 4 length of its headers · 4 CRC of these eight · headers · payload · 4 CRC of all before

Rule 1. A frame is believed only if both of its checksums are right. What is not is passed over, up to the next
        beginning that has a right checksum: so the end of a stream can be read where its middle was not kept.
Rule 2. An event reads as `{"its type": payload}`. A model's own chunk, which stands in there as base64, reads as
        itself; an exception reads as an object with an `error`, which is what the other formats send.
"""

from __future__ import annotations

import binascii
import re
import zlib
from collections.abc import Iterator
from typing import Final

from llm_guard_mw.metering.loose_json import Doc, parse

_PRELUDE_BYTES: Final = 12
_FRAME_BYTES_MIN: Final = 16
#: The protocol's own bound.
_FRAME_BYTES_MAX: Final = 24 * 1024 * 1024
#: How the first header of a frame begins: the length of its name, and the name. All that are sent begin with a colon.
_FIRST_HEADER = re.compile(rb"[\x05-\x20]:[a-z]")
_TRIED_MAX = 4096
_STRING, _BYTES = 7, 6
#: The lengths of header values that have no length of their own, by type.
_FIXED = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}

Span = tuple[int, int]


def looks_like_frames(data: bytes) -> bool:
    """Whether these bytes begin with a frame's two lengths and the checksum over them."""
    return _frame_bytes(data, 0) > 0


def spans(data: bytes) -> tuple[list[Span], bool]:
    """Where the frames stand, in order, and whether the bytes end with the last of them."""
    found: list[Span] = []
    at = 0
    while at < len(data):
        size = _frame_bytes(data, at)
        if size and at + size <= len(data):
            found.append((at, at + size))
            at += size
        elif size:
            return found, False  # the bytes were cut within it
        else:
            at = _next_frame(data, at + 1)
    return found, at == len(data)


def document(data: bytes, span: Span) -> Doc | None:
    """What a frame says; None if a checksum is wrong, or if it says nothing."""
    start, end = span
    frame = data[start:end]
    if zlib.crc32(frame[:-4]) != int.from_bytes(frame[-4:], "big"):
        return None
    headers_end = _PRELUDE_BYTES + int.from_bytes(frame[4:8], "big")
    headers = _headers(frame[_PRELUDE_BYTES:headers_end])
    if headers.get(":message-type") == "exception":
        return {"error": {"code": headers.get(":exception-type") or "exception"}}
    if headers.get(":message-type") == "error":
        return {"error": {"code": headers.get(":error-code") or "error"}}
    said = parse(frame[headers_end:-4])
    if not isinstance(said, dict):
        return None
    chunk = said.get("bytes")
    if isinstance(chunk, str):
        return _decoded(chunk)
    return {headers.get(":event-type") or "event": said}


def documents(data: bytes, frames: list[Span]) -> Iterator[Doc]:
    """What these frames say, those left out that say nothing."""
    for span in frames:
        doc = document(data, span)
        if doc is not None:
            yield doc


def _frame_bytes(data: bytes, at: int) -> int:
    """The length of the frame that begins here; 0 if none does."""
    size = int.from_bytes(data[at : at + 4], "big")
    if not _FRAME_BYTES_MIN <= size <= _FRAME_BYTES_MAX or at + _PRELUDE_BYTES > len(data):
        return 0
    headers = int.from_bytes(data[at + 4 : at + 8], "big")
    if headers > size - _FRAME_BYTES_MIN:
        return 0
    crc = int.from_bytes(data[at + 8 : at + 12], "big")
    return size if zlib.crc32(data[at : at + 8]) == crc else 0


def _next_frame(data: bytes, at: int) -> int:
    """The first beginning of a frame from here on; the end of the data if there is none."""
    for _, match in zip(range(_TRIED_MAX), _FIRST_HEADER.finditer(data, at + _PRELUDE_BYTES), strict=False):
        begin = match.start() - _PRELUDE_BYTES
        if _frame_bytes(data, begin):
            return begin
    return len(data)


def _headers(data: bytes) -> dict[str, str]:
    """The headers that are text."""
    headers: dict[str, str] = {}
    at = 0
    while at < len(data):
        name_end = at + 1 + data[at]
        name = data[at + 1 : name_end].decode("utf-8", "replace")
        kind = data[name_end] if name_end < len(data) else -1
        at = name_end + 1
        if kind in _FIXED:
            at += _FIXED[kind]
        elif kind in (_STRING, _BYTES):
            value_end = at + 2 + int.from_bytes(data[at : at + 2], "big")
            if kind == _STRING:
                headers[name] = data[at + 2 : value_end].decode("utf-8", "replace")
            at = value_end
        else:
            break
    return headers


def _decoded(chunk: str) -> Doc | None:
    try:
        said = parse(binascii.a2b_base64(chunk))
    except (binascii.Error, ValueError):
        return None
    return said if isinstance(said, dict) else None

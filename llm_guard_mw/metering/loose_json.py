"""JSON as it comes off the wire: whole, cut short, one value after another, or hostile.

Nothing here raises. What cannot be read is None, or is left out.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

#: Foreign JSON: whatever the other side put there. Every reader checks the types it needs.
Doc = dict[str, Any]

_stdlib = json.JSONDecoder()
_decode = msgspec.json.Decoder().decode

_USAGE_MEMBER = re.compile(r'"(?:usage|usageMetadata|usage_metadata|usage_info|meta)"\s*:\s*\{')
#: Where the last members of a document may begin: with its usage, or with the first of several counts.
_LAST_MEMBERS = re.compile(
    r'"(?:(?:usage|usageMetadata|usage_metadata|usage_info|meta)"\s*:\s*\{'
    r'|(?:total_duration|inputTextTokenCount|num_tokens_prompt_total|input_token_count)"\s*:)'
)
_CLOSERS = re.compile(r"[\s}\]]*\Z")
_BETWEEN_VALUES = re.compile(r"[\s,\x1e]*")
_MEMBERS_TRIED = 16
_DOCS_MAX = 8192


def parse_strictly(data: bytes) -> Any:
    """The value; None if the bytes are not one value of proper JSON."""
    try:
        return _decode(data)
    except (ValueError, RecursionError):
        return None


def parse(data: bytes) -> Any:
    """The value, or None. NaN, lone surrogates and bytes that are no UTF-8 are let through: servers send them."""
    try:
        return _decode(data)
    except (ValueError, RecursionError):
        pass
    try:
        return json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def parse_each(data: bytes) -> tuple[list[Doc], bool]:
    """The objects that stand one after another (lines, or an array that was cut), and whether nothing was left over."""
    text = data.decode("utf-8", "replace")
    at = _after(text, 0)
    in_array = text.startswith("[", at)
    if in_array:
        at = _after(text, at + 1)
    docs: list[Doc] = []
    while at < len(text) and len(docs) < _DOCS_MAX:
        try:
            value, at = _stdlib.raw_decode(text, at)
        except (ValueError, RecursionError):
            return docs, False
        if isinstance(value, dict):
            docs.append(value)
        at = _after(text, at)
    return docs, bool(docs) and not in_array and at >= len(text)


def _after(text: str, at: int) -> int:
    match = _BETWEEN_VALUES.match(text, at)
    return match.end() if match else at


def read_end(tail: bytes) -> Doc | None:
    """The last members of a document of which only the end is at hand, from its usage onwards.

    `"usage": {...}, "service_tier": "x"}}` reads as `{"usage": {...}, "service_tier": "x"}`. Only closing brackets
    may follow, so a `usage` deep inside of what a model wrote, with more of the document behind it, is not taken.
    """
    text = tail.decode("utf-8", "replace")
    for match in list(_LAST_MEMBERS.finditer(text))[-_MEMBERS_TRIED:]:
        try:
            doc, end = _stdlib.raw_decode("{" + text[match.start() :])
        except (ValueError, RecursionError):
            continue
        if _CLOSERS.match(text, match.start() + end - 1):
            return doc  # type: ignore[no-any-return]  # an object was opened, so an object came out
    return None


def read_cut(tail: bytes) -> Doc | None:
    """The last complete usage object of a document that was cut off behind it."""
    text = tail.decode("utf-8", "replace")
    for match in reversed(list(_USAGE_MEMBER.finditer(text))[-_MEMBERS_TRIED:]):
        try:
            value, _ = _stdlib.raw_decode(text, match.end() - 1)
        except (ValueError, RecursionError):
            continue
        return {text[match.start() + 1 : text.index('"', match.start() + 1)]: value}
    return None

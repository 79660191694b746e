"""OpenAI's Responses: one JSON object (created or retrieved), or events of which the last holds the whole response.

The usage counts when the response is over: `completed`, `incomplete`, `failed`, `cancelled`. Before that, and for a
background response that is still at work, it is null.
"""

from __future__ import annotations

from collections.abc import Iterator

from llm_guard_mw.metering.dialects.dialect import (
    TOOL_PARTS,
    Dialect,
    Notes,
    error_of,
    object_of,
    objects_of,
    says_something,
    text_of,
)
from llm_guard_mw.metering.dialects.openai_tokens import read_tokens
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage

_OVER = frozenset({"completed", "incomplete", "failed", "cancelled"})
_OVER_EVENTS = frozenset(f"response.{status}" for status in _OVER)


def _recognises(doc: Doc) -> bool:
    kind = doc.get("type")
    if isinstance(kind, str) and kind.startswith("response."):
        return True
    if doc.get("object") in ("response", "response.compaction"):
        return True
    usage = object_of(doc.get("usage"))
    return "input_tokens" in usage and "total_tokens" in usage


def _note(doc: Doc, notes: Notes) -> None:
    kind = doc.get("type")
    is_event = isinstance(kind, str) and (kind.startswith("response.") or kind == "error")
    if kind == "error":
        # Current streams have the code beside the type, older ones inside of `error`.
        notes.error = error_of(doc.get("error") or {"code": doc.get("code") or "error"})
    response = doc.get("response")
    if not isinstance(response, dict):
        if is_event:
            return
        response = doc
    status = response.get("status")
    over = (isinstance(status, str) and status in _OVER) or (is_event and kind in _OVER_EVENTS)
    notes.ended = notes.ended or (is_event and over)
    notes.pending = not over and not is_event and isinstance(status, str)
    notes.background = notes.background or response.get("background") is True
    notes.identify(response.get("model"), response.get("id"), response.get("service_tier"))
    usage = object_of(response.get("usage"))
    if says_something(usage):
        notes.usage, notes.usage_final = usage, over or not is_event
        notes.parts = _tools(response)
    if response.get("error"):
        notes.error = error_of(response["error"])


def _tools(response: Doc) -> dict[str, int] | None:
    """The uses of OpenAI's own tools: they stand in the output, one item each, and in no counter."""
    parts: dict[str, int] = {}
    for item in objects_of(response.get("output")):
        kind = item.get("type")
        part = TOOL_PARTS.get(kind) if isinstance(kind, str) else None
        # Opening a page that a search has found is an item as well, and costs nothing more.
        if part is not None and object_of(item.get("action")).get("type", "search") == "search":
            parts[part] = parts.get(part, 0) + 1
    return parts or None


def _usage(usage: Doc, notes: Notes) -> Usage | None:
    return read_tokens(usage, notes)


def _text(doc: Doc) -> Iterator[str]:
    kind = doc.get("type")
    if isinstance(kind, str) and kind.startswith("response."):
        # The deltas hold everything; the `done` events and the final response only repeat it.
        if kind.endswith(".delta"):
            yield from text_of(doc.get("delta"))
        elif kind == "response.output_item.added":
            yield from text_of(object_of(doc.get("item")).get("name"))
        return
    for item in objects_of(doc.get("output")):
        yield from text_of(item.get("name"), item.get("arguments"), item.get("input"), item.get("code"))
        for part in (*objects_of(item.get("content")), *objects_of(item.get("summary"))):
            yield from text_of(part.get("text"), part.get("refusal"))


_MEMBERS = frozenset({"type", "object", "usage"})
OPENAI_RESPONSES = Dialect("openai.responses", _MEMBERS, _recognises, _note, _usage, _text)

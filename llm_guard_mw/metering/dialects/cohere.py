"""Cohere: chat (both versions), generate, embed, rerank, classify; one JSON object, events (v2) or lines (v1).

What is billed stands in `billed_units`, in the `usage` of v2's chat and in the `meta` of everything else. The `tokens`
beside it count what the model saw, with templates and cached prefixes that cost nothing; `cached_tokens` belongs to
them. Only an answer that has no billed units is read from its `tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator

from llm_guard_mw.metering.dialects.dialect import (
    Dialect,
    Notes,
    count_of,
    error_of,
    frozen_parts,
    json_text,
    object_of,
    objects_of,
    says_something,
    text_of,
    total_of,
)
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage

_MEMBERS = frozenset({"meta", "usage", "type", "event_type", "is_finished", "generations"})
_EVENTS_V2 = frozenset(
    {
        "message-start",
        "content-start",
        "content-delta",
        "content-end",
        "tool-plan-delta",
        "tool-call-start",
        "tool-call-delta",
        "tool-call-end",
        "citation-start",
        "citation-end",
        "message-end",
    }
)
_EVENTS_V1 = frozenset(
    {
        "stream-start",
        "search-queries-generation",
        "search-results",
        "text-generation",
        "citation-generation",
        "tool-calls-generation",
        "tool-calls-chunk",
        "stream-end",
    }
)


def _recognises(doc: Doc) -> bool:
    kind, event = doc.get("type"), doc.get("event_type")
    if (isinstance(kind, str) and kind in _EVENTS_V2) or (isinstance(event, str) and event in _EVENTS_V1):
        return True
    if isinstance(doc.get("is_finished"), bool) or isinstance(doc.get("generations"), list):
        return True
    return "billed_units" in object_of(doc.get("usage")) or "billed_units" in object_of(doc.get("meta"))


def _note(doc: Doc, notes: Notes) -> None:
    event = doc.get("type") or doc.get("event_type")
    inner = doc
    if event == "message-end":
        inner = object_of(doc.get("delta"))
    elif isinstance(doc.get("response"), dict):  # the last line of v1
        inner = doc["response"]
    notes.ended = notes.ended or event in ("message-end", "stream-end") or doc.get("is_finished") is True
    notes.identify(inner.get("model"), inner.get("response_id") or inner.get("id") or doc.get("id"))
    for usage in (object_of(inner.get("usage")), object_of(inner.get("meta"))):
        if says_something(object_of(usage.get("billed_units"))) or says_something(object_of(usage.get("tokens"))):
            notes.usage, notes.usage_final = usage, True
    notes.error = _error(inner, doc) or notes.error


def _error(inner: Doc, doc: Doc) -> str | None:
    code = inner.get("error_type")
    reason = inner.get("finish_reason") or doc.get("finish_reason")
    if inner.get("error") or (isinstance(reason, str) and reason.upper().startswith("ERROR")):
        return error_of({"code": code, **object_of(inner.get("error"))})
    return error_of({"code": code}) if code else None


def _usage(usage: Doc, notes: Notes) -> Usage | None:
    billed = object_of(usage.get("billed_units"))
    if not says_something(billed):
        return _from_tokens(usage, notes)
    images = count_of(billed.get("image_tokens"))
    parts = {
        "image_input_tokens": images,
        "images": count_of(billed.get("images")),
        "search_units": count_of(billed.get("search_units")),
        "classifications": count_of(billed.get("classifications")),
    }
    return Usage(
        input_tokens=total_of(count_of(billed.get("input_tokens")), images),
        output_tokens=count_of(billed.get("output_tokens")),
        model=notes.model,
        parts=frozen_parts(parts),
    )


def _from_tokens(usage: Doc, notes: Notes) -> Usage:
    tokens = object_of(usage.get("tokens"))
    return Usage(
        input_tokens=count_of(tokens.get("input_tokens")),
        output_tokens=count_of(tokens.get("output_tokens")),
        cached_input_tokens=count_of(usage.get("cached_tokens")),
        reasoning_tokens=count_of(tokens.get("reasoning_tokens")),
        model=notes.model,
    )


def _text(doc: Doc) -> Iterator[str]:
    if doc.get("is_finished") is True or doc.get("type") == "message-end":
        return  # the last line of v1 repeats everything
    yield from text_of(doc.get("text"))
    message = object_of(object_of(doc.get("delta")).get("message")) or object_of(doc.get("message"))
    content = message.get("content")
    for block in (*objects_of(content), object_of(content)):
        yield from text_of(block.get("thinking"), block.get("text"))
    yield from text_of(message.get("tool_plan"))
    calls = message.get("tool_calls")
    for call in (*objects_of(calls), object_of(calls)):
        function = object_of(call.get("function"))
        yield from text_of(function.get("name"), function.get("arguments"))
    for call in objects_of(doc.get("tool_calls")):  # v1
        yield from text_of(call.get("name"))
        yield json_text(call.get("parameters"))
    for generation in objects_of(doc.get("generations")):
        yield from text_of(generation.get("text"))


COHERE = Dialect("cohere", _MEMBERS, _recognises, _note, _usage, _text)

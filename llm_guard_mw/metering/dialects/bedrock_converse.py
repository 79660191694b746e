"""Bedrock's Converse, and Nova's own format, which is nearly the same: one JSON object, or frames up to `metadata`.

`inputTokens` excludes what was read from and written to the cache, so the input is the sum of the three.
"""

from __future__ import annotations

from collections.abc import Iterator

from llm_guard_mw.metering.dialects.dialect import (
    Dialect,
    Notes,
    count_of,
    error_of,
    first_count,
    frozen_parts,
    json_text,
    object_of,
    objects_of,
    says_something,
    text_of,
    tool_parts,
    total_of,
)
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage

_EVENTS = frozenset(
    {"messageStart", "contentBlockStart", "contentBlockDelta", "contentBlockStop", "messageStop", "metadata"}
)
_MEMBERS = _EVENTS | {"usage", "output"}


def _recognises(doc: Doc) -> bool:
    if "inputTokens" in object_of(doc.get("usage")) or "inputTokens" in object_of(_metadata(doc).get("usage")):
        return True
    if "message" in object_of(doc.get("output")) and "stopReason" in doc:
        return True
    return any(isinstance(doc.get(event), dict) for event in _EVENTS if event != "metadata")


def _metadata(doc: Doc) -> Doc:
    return object_of(doc.get("metadata"))


def _note(doc: Doc, notes: Notes) -> None:
    # The stream is over with its metadata, which come last; but the message itself is complete before.
    notes.ended = notes.ended or "messageStop" in doc
    for said in (doc, _metadata(doc)):
        usage = object_of(said.get("usage"))
        tier = said.get("serviceTier")
        notes.identify(None, None, object_of(tier).get("type") if isinstance(tier, dict) else tier)
        if says_something(usage):
            notes.usage, notes.usage_final = usage, True
    notes.error = error_of(doc.get("error")) or notes.error


def _usage(usage: Doc, notes: Notes) -> Usage | None:
    uncached = count_of(usage.get("inputTokens"))
    cached = first_count(usage.get("cacheReadInputTokens"), usage.get("cacheReadInputTokenCount"))
    by_age = _written_by_age(usage)
    written = first_count(
        usage.get("cacheWriteInputTokens"),
        usage.get("cacheWriteInputTokenCount"),
        total_of(*by_age.values()),
    )
    return Usage(
        input_tokens=total_of(uncached, cached, written),
        output_tokens=count_of(usage.get("outputTokens")),
        cached_input_tokens=cached,
        cache_write_tokens=written,
        model=notes.model,
        parts=frozen_parts({**by_age, **tool_parts(object_of(usage.get("serverToolUsage")))}),
    )


def _written_by_age(usage: Doc) -> dict[str, int | None]:
    parts: dict[str, int | None] = {}
    for detail in objects_of(usage.get("cacheDetails")):
        if detail.get("ttl") in ("5m", "1h"):
            name = f"cache_write_{detail['ttl']}"
            parts[name] = total_of(parts.get(name), count_of(detail.get("inputTokens")))
    return parts


def _text(doc: Doc) -> Iterator[str]:
    message = object_of(object_of(doc.get("output")).get("message"))
    delta = object_of(object_of(doc.get("contentBlockDelta")).get("delta"))
    start = object_of(object_of(doc.get("contentBlockStart")).get("start"))
    for block in (*objects_of(message.get("content")), delta, start):
        yield from text_of(block.get("text"))
        reasoning = object_of(block.get("reasoningContent"))
        yield from text_of(reasoning.get("text"), object_of(reasoning.get("reasoningText")).get("text"))
        call = object_of(block.get("toolUse"))
        yield from text_of(call.get("name"))
        written = call.get("input")
        if isinstance(written, str):
            yield written
        elif written:
            yield json_text(written)


BEDROCK_CONVERSE = Dialect("bedrock.converse", _MEMBERS, _recognises, _note, _usage, _text)

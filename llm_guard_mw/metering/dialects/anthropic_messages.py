"""Anthropic's messages, also on Vertex and Azure: one JSON object, or events from `message_start` to `message_stop`.

`input_tokens` excludes what was read from and written to the cache, so the input is the sum of the three. In a stream
`message_start` has a first count and `message_delta` the final one: what the latter says, and is not null, wins.

With `iterations` (compaction, an advisor) the top level says what the last round used; the price comes from the sums
over all rounds, which are in `parts`. Rounds of another model are also there by its name, `iterations_input@MODEL`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from llm_guard_mw.metering.dialects.dialect import (
    NO_PARTS,
    Dialect,
    Notes,
    count_of,
    error_of,
    first_count,
    frozen_parts,
    json_text,
    name_of,
    object_of,
    objects_of,
    says_something,
    text_of,
    tool_parts,
    total_of,
)
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage

_EVENTS = ("message_start", "message_delta", "message_stop", "content_block_start", "content_block_delta")
#: Members of a usage that make `parts`.
_WITH_PARTS = frozenset({"cache_creation", "server_tool_use", "iterations"})
_ITERATIONS_MAX = 256
_MODELS_MAX = 8


def _recognises(doc: Doc) -> bool:
    kind = doc.get("type")
    if kind in _EVENTS or (kind == "message" and isinstance(doc.get("content"), list)):
        return True
    if kind == "error" and isinstance(doc.get("error"), dict):
        return True
    usage = object_of(doc.get("usage"))
    return "input_tokens" in usage and "total_tokens" not in usage and not usage.get("input_tokens_details")


def _note(doc: Doc, notes: Notes) -> None:
    kind = doc.get("type")
    message = doc.get("message") if kind == "message_start" else doc
    if not isinstance(message, dict):
        return
    usage = object_of(message.get("usage"))
    notes.identify(message.get("model"), message.get("id"), usage.get("service_tier"))
    if kind == "message_stop":
        notes.ended = True
    if says_something(usage):
        if notes.usage is not None:
            usage = {**notes.usage, **{name: value for name, value in usage.items() if value is not None}}
        notes.usage = usage
        notes.usage_final = kind != "message_start"
    if doc.get("error"):
        notes.error = error_of({"code": object_of(doc["error"]).get("type")})


def _usage(usage: Doc, notes: Notes) -> Usage | None:
    cached, written = count_of(usage.get("cache_read_input_tokens")), _written(usage)
    uncached, output = count_of(usage.get("input_tokens")), count_of(usage.get("output_tokens"))
    if uncached is None and output is None:
        return None
    thought = object_of(usage.get("output_tokens_details"))
    return Usage(
        total_of(uncached, cached, written),
        output,
        cached,
        written,
        first_count(thought.get("thinking_tokens"), thought.get("reasoning_tokens")) if thought else None,
        None,
        None,
        notes.model,
        True,
        _parts(usage, notes.model),
    )


def _parts(usage: Doc, model: str | None) -> Mapping[str, int]:
    if _WITH_PARTS.isdisjoint(usage):
        return NO_PARTS
    by_age = object_of(usage.get("cache_creation"))
    parts: dict[str, int | None] = {
        "cache_write_5m": count_of(by_age.get("ephemeral_5m_input_tokens")),
        "cache_write_1h": count_of(by_age.get("ephemeral_1h_input_tokens")),
    }
    if usage.get("server_tool_use"):
        parts |= tool_parts(object_of(usage["server_tool_use"]))
    if usage.get("iterations"):
        parts |= _iterations(usage, model)
    return frozen_parts(parts)


def _written(usage: Doc) -> int | None:
    written = count_of(usage.get("cache_creation_input_tokens"))
    if written is not None or "cache_creation" not in usage:
        return written
    by_age = object_of(usage["cache_creation"])
    return total_of(
        count_of(by_age.get("ephemeral_5m_input_tokens")), count_of(by_age.get("ephemeral_1h_input_tokens"))
    )


def _iterations(usage: Doc, model: str | None) -> dict[str, int]:
    sums: dict[str, int] = {}
    others: set[str] = set()
    for _, iteration in zip(range(_ITERATIONS_MAX), objects_of(usage.get("iterations")), strict=False):
        cached = count_of(iteration.get("cache_read_input_tokens"))
        written = _written(iteration)
        by_age = object_of(iteration.get("cache_creation"))
        counts = {
            "iterations_input": total_of(count_of(iteration.get("input_tokens")), cached, written),
            "iterations_output": count_of(iteration.get("output_tokens")),
            "iterations_cached_input": cached,
            "iterations_cache_write": written,
            "iterations_cache_write_5m": count_of(by_age.get("ephemeral_5m_input_tokens")),
            "iterations_cache_write_1h": count_of(by_age.get("ephemeral_1h_input_tokens")),
        }
        other = name_of(iteration.get("model"))
        if other == model or (other not in others and len(others) == _MODELS_MAX):
            other = None
        if other is not None:
            others.add(other)
        for name, count in counts.items():
            if count is not None:
                sums[name] = sums.get(name, 0) + count
                if other is not None:
                    sums[f"{name}@{other}"] = sums.get(f"{name}@{other}", 0) + count
    return {name: count for name, count in sums.items() if count_of(count) is not None}


def _text(doc: Doc) -> Iterator[str]:
    for block in (
        *objects_of(doc.get("content")),
        object_of(doc.get("content_block")),
        object_of(doc.get("delta")),
    ):
        yield from text_of(block.get("thinking"), block.get("text"), block.get("partial_json"), block.get("name"))
        if block.get("input"):  # parsed in a whole body; in a stream it comes as partial_json
            yield json_text(block["input"])


_MEMBERS = frozenset({"type", "usage"})
ANTHROPIC_MESSAGES = Dialect("anthropic.messages", _MEMBERS, _recognises, _note, _usage, _text)

"""Anthropic's messages, also on Vertex and Azure: one JSON object, or events from `message_start` to `message_stop`.

`input_tokens` excludes what was read from and written to the cache, so the input is the sum of the three. In a stream
`message_start` has a first count and `message_delta` the final one: what the latter says, and is not null, wins.

With `iterations` (compaction, an advisor) the top level says what the last round used; the price comes from the sums
over all rounds, which are in `parts`. Rounds of another model are also there by its name, `iterations_input@MODEL`.
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
    notes.identify(model=message.get("model"), response_id=message.get("id"), service_tier=usage.get("service_tier"))
    notes.ended = notes.ended or kind == "message_stop"
    if says_something(usage):
        said = {name: value for name, value in usage.items() if value is not None}
        notes.usage = {**(notes.usage or {}), **said}
        notes.usage_final = kind != "message_start"
    notes.error = error_of(_error(doc)) or notes.error


def _error(doc: Doc) -> Doc | None:
    error = doc.get("error")
    if not error:
        return None
    return {"code": object_of(error).get("type")}


def _usage(usage: Doc, notes: Notes) -> Usage | None:
    written = _written(usage)
    cached = count_of(usage.get("cache_read_input_tokens"))
    uncached, output = count_of(usage.get("input_tokens")), count_of(usage.get("output_tokens"))
    if uncached is None and output is None:
        return None
    by_age = object_of(usage.get("cache_creation"))
    parts: dict[str, int | None] = {
        "cache_write_5m": count_of(by_age.get("ephemeral_5m_input_tokens")),
        "cache_write_1h": count_of(by_age.get("ephemeral_1h_input_tokens")),
        **tool_parts(object_of(usage.get("server_tool_use"))),
        **_iterations(usage, notes.model),
    }
    thought = object_of(usage.get("output_tokens_details"))
    return Usage(
        input_tokens=total_of(uncached, cached, written),
        output_tokens=output,
        cached_input_tokens=cached,
        cache_write_tokens=written,
        reasoning_tokens=first_count(thought.get("thinking_tokens"), thought.get("reasoning_tokens")),
        model=notes.model,
        parts=frozen_parts(parts),
    )


def _written(usage: Doc) -> int | None:
    by_age = object_of(usage.get("cache_creation"))
    return first_count(
        usage.get("cache_creation_input_tokens"),
        total_of(count_of(by_age.get("ephemeral_5m_input_tokens")), count_of(by_age.get("ephemeral_1h_input_tokens"))),
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

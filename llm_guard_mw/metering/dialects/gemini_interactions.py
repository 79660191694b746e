"""Gemini's interactions: one JSON object (created or retrieved), or events up to `interaction.completed`.

The parts are disjoint: thoughts stand beside the output, what tools brought in beside the input. `metadata` of the
first events has running counts; those of the interaction itself are the final ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llm_guard_mw.metering.dialects.dialect import (
    TOOL_PARTS,
    Dialect,
    Notes,
    count_of,
    either,
    error_of,
    frozen_parts,
    json_text,
    object_of,
    objects_of,
    says_something,
    text_of,
    total_of,
)
from llm_guard_mw.metering.dialects.gemini_generate import google_error, modality_tokens
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage

_MEMBERS = frozenset({"object", "event_type", "interaction", "usage"})
_EVENTS = ("interaction.", "step.", "content.")
_OVER = ("completed", "incomplete", "failed", "cancelled", "requires_action")
_OVER_EVENTS = ("interaction.completed", "interaction.complete")


def _recognises(doc: Doc) -> bool:
    event = doc.get("event_type")
    if doc.get("object") == "interaction" or (isinstance(event, str) and event.startswith(_EVENTS)):
        return True
    usage = object_of(doc.get("usage"))
    return "total_input_tokens" in usage or "totalInputTokens" in usage


def _note(doc: Doc, notes: Notes) -> None:
    event = doc.get("event_type")
    inner = doc.get("interaction")
    interaction = inner if isinstance(inner, dict) else doc
    status = interaction.get("status")
    over = event in _OVER_EVENTS or (isinstance(status, str) and status.lower() in _OVER)
    notes.ended = notes.ended or (event is not None and over)
    notes.pending = event is None and not over and isinstance(status, str)
    notes.background = notes.background or interaction.get("background") is True
    notes.identify(interaction.get("model"), interaction.get("id"), either(interaction, "serviceTier", "service_tier"))
    usage = object_of(interaction.get("usage"))
    running = object_of(object_of(doc.get("metadata")).get("usage"))
    if says_something(usage):
        notes.usage, notes.usage_final = usage, over or event is None
    elif says_something(running) and not notes.usage_final:
        notes.usage = running
    notes.error = error_of(google_error(doc.get("error") or interaction.get("error"))) or notes.error


def _usage(usage: Doc, notes: Notes) -> Usage | None:
    def count(camel: str, snake: str) -> int | None:
        return count_of(either(usage, camel, snake))

    prompt = count("totalInputTokens", "total_input_tokens")
    tools = count("totalToolUseTokens", "total_tool_use_tokens")
    wrote = count("totalOutputTokens", "total_output_tokens")
    thought = count("totalThoughtTokens", "total_thought_tokens")
    output, total = total_of(wrote, thought), count("totalTokens", "total_tokens")
    if tools and prompt is not None and total == prompt + (output or 0):
        tools = None  # the total proves that they are in the prompt already
    asked = either(usage, "inputTokensByModality", "input_tokens_by_modality")
    said = either(usage, "outputTokensByModality", "output_tokens_by_modality")
    return Usage(
        input_tokens=None if prompt is None else total_of(prompt, tools),
        output_tokens=output,
        cached_input_tokens=count("totalCachedTokens", "total_cached_tokens"),
        reasoning_tokens=thought,
        audio_input_tokens=modality_tokens(asked, "AUDIO"),
        audio_output_tokens=modality_tokens(said, "AUDIO"),
        model=notes.model,
        parts=frozen_parts(
            {
                **_tools(either(usage, "groundingToolCount", "grounding_tool_count")),
                "image_output_tokens": modality_tokens(said, "IMAGE"),
            }
        ),
    )


def _tools(counts: Any) -> dict[str, int | None]:  # Any: foreign JSON
    parts: dict[str, int | None] = {}
    for tool in objects_of(counts):
        kind = tool.get("type")
        name = TOOL_PARTS.get(kind.lower()) if isinstance(kind, str) else None
        if name is not None:
            parts[name] = total_of(parts.get(name), count_of(tool.get("count")))
    return parts


def _text(doc: Doc) -> Iterator[str]:
    delta = doc.get("delta")
    if isinstance(delta, dict):
        yield from _content_text(delta)
    if "event_type" in doc:
        return  # the deltas hold everything; the rest repeats it
    for step in (*objects_of(doc.get("steps")), *objects_of(doc.get("outputs"))):
        yield from _content_text(step)


def _content_text(item: Doc) -> Iterator[str]:
    yield from text_of(item.get("text"), item.get("name"), item.get("code"))
    if item.get("arguments"):
        yield json_text(item["arguments"])
    for name in ("content", "summary"):
        inner = item.get(name)
        for part in (*objects_of(inner), object_of(inner)):
            yield from text_of(part.get("text"))


GEMINI_INTERACTIONS = Dialect("gemini.interactions", _MEMBERS, _recognises, _note, _usage, _text)

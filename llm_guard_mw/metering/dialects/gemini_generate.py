"""Gemini's generateContent, on Google's API and on Vertex: one JSON object, a JSON array of chunks, or events.

The counts run along in nearly every chunk and may fall as well as rise: the last one counts, never a maximum or a
sum. A chunk without `candidatesTokenCount` wrote nothing, so it is 0; without `promptTokenCount` the input is unknown.
Enumerations come as words or as numbers. What an SDK has parsed and dumped again has `snake_case` names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from llm_guard_mw.metering.dialects.dialect import (
    NO_PARTS,
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
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage

_MEMBERS = frozenset({"usageMetadata", "usage_metadata", "candidates", "promptFeedback"})


class _Names(NamedTuple):
    """The members of a usage object, as the wire has them, and as an SDK that has parsed them does."""

    prompt: str
    tools: str
    candidates: str
    thoughts: str
    cached: str
    asked: str
    wrote: str


_CAMEL = _Names(
    "promptTokenCount",
    "toolUsePromptTokenCount",
    "candidatesTokenCount",
    "thoughtsTokenCount",
    "cachedContentTokenCount",
    "promptTokensDetails",
    "candidatesTokensDetails",
)
_SNAKE = _Names(
    "prompt_token_count",
    "tool_use_prompt_token_count",
    "candidates_token_count",
    "thoughts_token_count",
    "cached_content_token_count",
    "prompt_tokens_details",
    "candidates_tokens_details",
)
#: Enumerations come as numbers as well.
_MODALITIES = {"IMAGE": 2, "AUDIO": 4}


def _recognises(doc: Doc) -> bool:
    return not _MEMBERS.isdisjoint(doc)


def _note(doc: Doc, notes: Notes) -> None:
    usage = object_of(either(doc, "usageMetadata", "usage_metadata"))
    notes.identify(
        either(doc, "modelVersion", "model_version"),
        either(doc, "responseId", "response_id"),
        either(usage, "serviceTier", "service_tier"),
    )
    candidates = doc.get("candidates")
    over = bool(object_of(either(doc, "promptFeedback", "prompt_feedback")))
    for candidate in candidates if isinstance(candidates, list) else ():
        if isinstance(candidate, dict):
            over = over or bool(either(candidate, "finishReason", "finish_reason"))
            _note_searches(candidate, notes)
    notes.ended = notes.ended or over
    # Vertex sends chunks whose metadata holds nothing but the kind of traffic.
    if says_something(usage):
        notes.usage, notes.usage_final = usage, notes.ended
    if doc.get("error"):
        notes.error = error_of(google_error(doc["error"]))


def _note_searches(candidate: Doc, notes: Notes) -> None:
    grounding = object_of(either(candidate, "groundingMetadata", "grounding_metadata"))
    if not grounding:
        return
    queries = either(grounding, "webSearchQueries", "web_search_queries")
    if isinstance(queries, list) and queries:
        notes.parts = {"web_searches": len(queries)}


def google_error(error: Any) -> Doc | None:  # Any: foreign JSON
    """Google's errors have the word in `status` and a number in `code`: the word says more."""
    if not error:
        return None
    said = object_of(error)
    return {"code": said.get("status") or said.get("code")}


def _usage(usage: Doc, notes: Notes) -> Usage | None:
    said = usage.get
    names = _SNAKE if "prompt_token_count" in usage or "total_token_count" in usage else _CAMEL
    prompt, tools = count_of(said(names.prompt)), count_of(said(names.tools))
    candidates, thoughts = count_of(said(names.candidates)), count_of(said(names.thoughts))
    asked, wrote = said(names.asked), said(names.wrote)
    parts = notes.parts
    images = modality_tokens(wrote, "IMAGE")
    if images is not None:
        parts = {"image_output_tokens": images, **(parts or {})}
    return Usage(
        None if prompt is None else total_of(prompt, tools),
        total_of(candidates or 0, thoughts),
        count_of(said(names.cached)),
        None,
        thoughts,
        modality_tokens(asked, "AUDIO"),
        modality_tokens(wrote, "AUDIO"),
        notes.model,
        True,
        NO_PARTS if parts is None else frozen_parts(parts),
    )


def modality_tokens(details: Any, kind: str) -> int | None:  # Any: foreign JSON
    """The tokens of one kind; None where it is not spoken of."""
    total = None
    for detail in details if isinstance(details, list) else ():
        if isinstance(detail, dict) and _is_modality(detail.get("modality"), kind):
            count = detail["tokens"] if "tokens" in detail else either(detail, "tokenCount", "token_count")
            total = total_of(total, count_of(count))
    return total


def _is_modality(said: Any, kind: str) -> bool:  # Any: foreign JSON
    return said.upper() == kind if isinstance(said, str) else said == _MODALITIES.get(kind)


def _text(doc: Doc) -> Iterator[str]:
    for candidate in objects_of(doc.get("candidates")):
        for part in objects_of(object_of(candidate.get("content")).get("parts")):
            yield from text_of(part.get("text"))
            call = object_of(either(part, "functionCall", "function_call"))
            if call:
                yield from text_of(call.get("name"))
                yield json_text(call.get("args"))
            code = object_of(either(part, "executableCode", "executable_code"))
            yield from text_of(code.get("code"))


GEMINI_GENERATE = Dialect("gemini.generate", _MEMBERS, _recognises, _note, _usage, _text)

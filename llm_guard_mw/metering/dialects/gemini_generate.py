"""Gemini's generateContent, on Google's API and on Vertex: one JSON object, a JSON array of chunks, or events.

The counts run along in nearly every chunk and may fall as well as rise: the last one counts, never a maximum or a
sum. A chunk without `candidatesTokenCount` wrote nothing, so it is 0; without `promptTokenCount` the input is unknown.
Enumerations come as words or as numbers. What an SDK has parsed and dumped again has `snake_case` names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llm_guard_mw.metering.dialects.dialect import (
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

#: Enumerations come as numbers as well.
_MODALITIES = {"IMAGE": 2, "AUDIO": 4}


def _recognises(doc: Doc) -> bool:
    return any(name in doc for name in ("usageMetadata", "usage_metadata", "candidates", "promptFeedback"))


def _note(doc: Doc, notes: Notes) -> None:
    usage = object_of(either(doc, "usageMetadata", "usage_metadata"))
    notes.identify(
        model=either(doc, "modelVersion", "model_version"),
        response_id=either(doc, "responseId", "response_id"),
        service_tier=either(usage, "serviceTier", "service_tier"),
    )
    candidates = list(objects_of(doc.get("candidates")))
    over = any(either(candidate, "finishReason", "finish_reason") for candidate in candidates)
    over = over or bool(object_of(either(doc, "promptFeedback", "prompt_feedback")))
    notes.ended = notes.ended or over
    # Vertex sends chunks whose metadata holds nothing but the kind of traffic.
    if says_something(usage):
        notes.usage, notes.usage_final = usage, notes.ended
    for candidate in candidates:
        _note_searches(candidate, notes)
    notes.error = error_of(google_error(doc.get("error"))) or notes.error


def _note_searches(candidate: Doc, notes: Notes) -> None:
    grounding = object_of(either(candidate, "groundingMetadata", "grounding_metadata"))
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
    prompt = count_of(either(usage, "promptTokenCount", "prompt_token_count"))
    tools = count_of(either(usage, "toolUsePromptTokenCount", "tool_use_prompt_token_count"))
    candidates = count_of(either(usage, "candidatesTokenCount", "candidates_token_count"))
    thoughts = count_of(either(usage, "thoughtsTokenCount", "thoughts_token_count"))
    asked = either(usage, "promptTokensDetails", "prompt_tokens_details")
    wrote = either(usage, "candidatesTokensDetails", "candidates_tokens_details")
    return Usage(
        input_tokens=None if prompt is None else total_of(prompt, tools),
        output_tokens=total_of(candidates or 0, thoughts),
        cached_input_tokens=count_of(either(usage, "cachedContentTokenCount", "cached_content_token_count")),
        reasoning_tokens=thoughts,
        audio_input_tokens=modality_tokens(asked, "AUDIO"),
        audio_output_tokens=modality_tokens(wrote, "AUDIO"),
        model=notes.model,
        parts=frozen_parts({"image_output_tokens": modality_tokens(wrote, "IMAGE"), **(notes.parts or {})}),
    )


def modality_tokens(details: Any, kind: str) -> int | None:  # Any: foreign JSON
    """The tokens of one kind; None where it is not spoken of."""
    if not isinstance(details, list):
        return None
    counts = [
        count_of(either(detail, "tokenCount", "token_count") if "tokens" not in detail else detail["tokens"])
        for detail in objects_of(details)
        if _is_modality(detail.get("modality"), kind)
    ]
    return total_of(*counts) if counts else None


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


_MEMBERS = frozenset({"usageMetadata", "usage_metadata", "candidates", "promptFeedback"})
GEMINI_GENERATE = Dialect("gemini.generate", _MEMBERS, _recognises, _note, _usage, _text)

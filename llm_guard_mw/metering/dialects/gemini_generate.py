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

_AUDIO = ("AUDIO", 4)
_IMAGE = ("IMAGE", 2)


def _either(doc: Doc, camel: str, snake: str) -> Any:  # Any: foreign JSON
    value = doc.get(camel)
    return doc.get(snake) if value is None else value


def _recognises(doc: Doc) -> bool:
    return any(name in doc for name in ("usageMetadata", "usage_metadata", "candidates", "promptFeedback"))


def _note(doc: Doc, notes: Notes) -> None:
    usage = object_of(_either(doc, "usageMetadata", "usage_metadata"))
    notes.identify(
        model=_either(doc, "modelVersion", "model_version"),
        response_id=_either(doc, "responseId", "response_id"),
        service_tier=_either(usage, "serviceTier", "service_tier"),
    )
    candidates = list(objects_of(doc.get("candidates")))
    over = any(_either(candidate, "finishReason", "finish_reason") for candidate in candidates)
    over = over or bool(object_of(_either(doc, "promptFeedback", "prompt_feedback")))
    notes.ended = notes.ended or over
    # Vertex sends chunks whose metadata holds nothing but the kind of traffic.
    if says_something(usage):
        notes.usage, notes.usage_final = usage, notes.ended
    for candidate in candidates:
        _note_searches(candidate, notes)
    notes.error = error_of(_error(doc.get("error"))) or notes.error


def _note_searches(candidate: Doc, notes: Notes) -> None:
    grounding = object_of(_either(candidate, "groundingMetadata", "grounding_metadata"))
    queries = _either(grounding, "webSearchQueries", "web_search_queries")
    if isinstance(queries, list) and queries:
        notes.parts = {"web_searches": len(queries)}


def _error(error: Any) -> Doc | None:  # Any: foreign JSON
    """Google's errors have the word in `status` and a number in `code`: the word says more."""
    if not error:
        return None
    said = object_of(error)
    return {"code": said.get("status") or said.get("code")}


def _usage(usage: Doc, notes: Notes) -> Usage | None:
    prompt = count_of(_either(usage, "promptTokenCount", "prompt_token_count"))
    tools = count_of(_either(usage, "toolUsePromptTokenCount", "tool_use_prompt_token_count"))
    candidates = count_of(_either(usage, "candidatesTokenCount", "candidates_token_count"))
    thoughts = count_of(_either(usage, "thoughtsTokenCount", "thoughts_token_count"))
    asked = _either(usage, "promptTokensDetails", "prompt_tokens_details")
    wrote = _either(usage, "candidatesTokensDetails", "candidates_tokens_details")
    return Usage(
        input_tokens=None if prompt is None else total_of(prompt, tools),
        output_tokens=total_of(candidates or 0, thoughts),
        cached_input_tokens=count_of(_either(usage, "cachedContentTokenCount", "cached_content_token_count")),
        reasoning_tokens=thoughts,
        audio_input_tokens=_modality(asked, _AUDIO),
        audio_output_tokens=_modality(wrote, _AUDIO),
        model=notes.model,
        parts=frozen_parts({"image_output_tokens": _modality(wrote, _IMAGE), **(notes.parts or {})}),
    )


def _modality(details: Any, kind: tuple[str, int]) -> int | None:  # Any: foreign JSON
    return total_of(
        *(
            count_of(_either(detail, "tokenCount", "token_count"))
            for detail in objects_of(details)
            if detail.get("modality") in kind
        )
    )


def _text(doc: Doc) -> Iterator[str]:
    for candidate in objects_of(doc.get("candidates")):
        for part in objects_of(object_of(candidate.get("content")).get("parts")):
            yield from text_of(part.get("text"))
            call = object_of(_either(part, "functionCall", "function_call"))
            if call:
                yield from text_of(call.get("name"))
                yield json_text(call.get("args"))
            code = object_of(_either(part, "executableCode", "executable_code"))
            yield from text_of(code.get("code"))


GEMINI_GENERATE = Dialect("gemini.generate", _recognises, _note, _usage, _text)

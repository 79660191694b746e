"""Gemini's embeddings: vectors, and from the newer models `usageMetadata` as well. Input only."""

from __future__ import annotations

from llm_guard_mw.metering.dialects.dialect import (
    Dialect,
    Notes,
    count_of,
    either,
    error_of,
    no_text,
    object_of,
    objects_of,
    says_something,
)
from llm_guard_mw.metering.dialects.gemini_generate import google_error, modality_tokens
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage

_MEMBERS = frozenset({"embedding", "embeddings", "usageMetadata", "usage_metadata"})


def _recognises(doc: Doc) -> bool:
    one = object_of(doc.get("embedding")) or next(objects_of(doc.get("embeddings")), object_of(None))
    if "values" in one:
        return True
    # Only the end is at hand: it speaks of a prompt and of nothing else, under a name that is not generate's.
    usage = object_of(either(doc, "usageMetadata", "usage_metadata"))
    return "candidates" not in doc and bool(either(usage, "promptTokenDetails", "prompt_token_details"))


def _note(doc: Doc, notes: Notes) -> None:
    usage = object_of(either(doc, "usageMetadata", "usage_metadata"))
    notes.identify(either(doc, "modelVersion", "model_version"), None)
    if says_something(usage):
        notes.usage, notes.usage_final = usage, True
    notes.error = error_of(google_error(doc.get("error"))) or notes.error


def _usage(usage: Doc, notes: Notes) -> Usage | None:
    details = either(usage, "promptTokenDetails", "prompt_token_details")
    return Usage(
        input_tokens=count_of(either(usage, "promptTokenCount", "prompt_token_count")),
        audio_input_tokens=modality_tokens(details, "AUDIO"),
        model=notes.model,
    )


GEMINI_EMBED = Dialect("gemini.embed", _MEMBERS, _recognises, _note, _usage, no_text)

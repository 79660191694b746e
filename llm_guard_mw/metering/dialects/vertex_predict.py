"""Vertex' `:predict`: each embedding has a token count of its own; PaLM's texts have theirs in the metadata."""

from __future__ import annotations

from collections.abc import Iterator

from llm_guard_mw.metering.dialects.dialect import (
    Dialect,
    Notes,
    count_of,
    error_of,
    frozen_parts,
    object_of,
    objects_of,
    text_of,
    total_of,
)
from llm_guard_mw.metering.dialects.gemini_generate import google_error
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage

_MEMBERS = frozenset({"predictions"})


def _recognises(doc: Doc) -> bool:
    return isinstance(doc.get("predictions"), list)


def _note(doc: Doc, notes: Notes) -> None:
    notes.identify(doc.get("model"), None)
    if _recognises(doc):
        notes.usage, notes.usage_final = doc, True
    notes.error = error_of(google_error(doc.get("error"))) or notes.error


def _usage(usage: Doc, notes: Notes) -> Usage | None:
    metadata = object_of(usage.get("metadata"))
    tokens = object_of(metadata.get("tokenMetadata"))
    asked, wrote = object_of(tokens.get("inputTokenCount")), object_of(tokens.get("outputTokenCount"))
    embedded = [
        count_of(object_of(object_of(prediction.get("embeddings")).get("statistics")).get("token_count"))
        for prediction in objects_of(usage.get("predictions"))
    ]
    prompt = total_of(count_of(asked.get("totalTokens")), *embedded)
    characters = count_of(metadata.get("billableCharacterCount"))
    characters = characters if characters is not None else count_of(asked.get("totalBillableCharacters"))
    if prompt is None and characters is None:
        return None
    return Usage(
        input_tokens=prompt,
        output_tokens=count_of(wrote.get("totalTokens")),
        model=notes.model,
        parts=frozen_parts({"characters": characters}),
    )


def _text(doc: Doc) -> Iterator[str]:
    for prediction in objects_of(doc.get("predictions")):
        yield from text_of(prediction.get("content"))
        for candidate in objects_of(prediction.get("candidates")):
            yield from text_of(candidate.get("content"))


VERTEX_PREDICT = Dialect("vertex.predict", _MEMBERS, _recognises, _note, _usage, _text)

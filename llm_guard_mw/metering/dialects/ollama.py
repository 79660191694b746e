"""Ollama's own API: lines of JSON of which the last, with `done`, has the counts; or that one alone.

`prompt_eval_count` is missing where the whole prompt was still in memory: then the input is unknown, not 0.
"""

from __future__ import annotations

from collections.abc import Iterator

from llm_guard_mw.metering.dialects.dialect import (
    Dialect,
    Notes,
    count_of,
    error_of,
    json_text,
    object_of,
    objects_of,
    text_of,
)
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage

_COUNTS = ("prompt_eval_count", "eval_count")
_MEMBERS = frozenset({"done", *_COUNTS, "total_duration"})


def _recognises(doc: Doc) -> bool:
    if isinstance(doc.get("done"), bool):
        return "created_at" in doc and ("message" in doc or "response" in doc)
    return any(count_of(doc.get(name)) is not None for name in _COUNTS)


def _note(doc: Doc, notes: Notes) -> None:
    notes.identify(doc.get("model"), None)
    notes.ended = notes.ended or doc.get("done") is True
    if any(count_of(doc.get(name)) is not None for name in _COUNTS):
        notes.usage, notes.usage_final = doc, doc.get("done") is not False
    notes.error = error_of(doc.get("error")) or notes.error


def _usage(usage: Doc, notes: Notes) -> Usage | None:
    return Usage(
        input_tokens=count_of(usage.get("prompt_eval_count")),
        output_tokens=count_of(usage.get("eval_count")),
        model=notes.model,
    )


def _text(doc: Doc) -> Iterator[str]:
    message = object_of(doc.get("message"))
    yield from text_of(doc.get("thinking"), doc.get("response"), message.get("thinking"), message.get("content"))
    for call in objects_of(message.get("tool_calls")):
        function = object_of(call.get("function"))
        yield from text_of(function.get("name"))
        if function.get("arguments"):
            yield json_text(function["arguments"])


OLLAMA = Dialect("ollama", _MEMBERS, _recognises, _note, _usage, _text)

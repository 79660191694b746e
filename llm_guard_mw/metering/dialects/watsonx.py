"""IBM watsonx' text generation: results with counts; in a stream each chunk has one.

The count of generated tokens runs along, so the last one counts; that of the input stands in the first chunk, and is
0 behind it.
"""

from __future__ import annotations

from collections.abc import Iterator

from llm_guard_mw.metering.dialects.dialect import (
    Dialect,
    Notes,
    count_of,
    error_of,
    objects_of,
    text_of,
    total_of,
)
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage

_MEMBERS = frozenset({"results", "input_token_count"})
_COUNTS = ("input_token_count", "generated_token_count")


def _recognises(doc: Doc) -> bool:
    if count_of(doc.get("input_token_count")) is not None:  # embeddings
        return True
    first = next(objects_of(doc.get("results")), {})
    return "generated_token_count" in first or "generated_text" in first


def _note(doc: Doc, notes: Notes) -> None:
    notes.identify(doc.get("model_id"), None)
    results = list(objects_of(doc.get("results")))
    said = {
        name: total_of(count_of(doc.get(name)), *(count_of(result.get(name)) for result in results)) for name in _COUNTS
    }
    before = notes.usage or {}
    if any(count is not None for count in said.values()):
        wrote = said["generated_token_count"]
        asked = [count for count in (before.get("input_token_count"), said["input_token_count"]) if count is not None]
        notes.usage = {
            "input_token_count": max(asked, default=None),
            "generated_token_count": before.get("generated_token_count") if wrote is None else wrote,
        }
    reasons = [result.get("stop_reason") for result in results]
    over = any(isinstance(reason, str) and reason.lower() != "not_finished" for reason in reasons)
    notes.ended = notes.ended or over
    notes.usage_final = notes.usage is not None and (over or not results)
    notes.error = error_of(doc.get("error") or next(objects_of(doc.get("errors")), None)) or notes.error


def _usage(usage: Doc, notes: Notes) -> Usage | None:
    return Usage(
        input_tokens=usage["input_token_count"], output_tokens=usage["generated_token_count"], model=notes.model
    )


def _text(doc: Doc) -> Iterator[str]:
    for result in objects_of(doc.get("results")):
        yield from text_of(result.get("generated_text"))


WATSONX_GENERATION = Dialect("watsonx.generation", _MEMBERS, _recognises, _note, _usage, _text)

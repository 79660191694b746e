"""Aleph Alpha's completions: two counts at the top of the answer."""

from __future__ import annotations

from collections.abc import Iterator

from llm_guard_mw.metering.dialects.dialect import Dialect, Notes, count_of, error_of, objects_of, text_of
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage

_MEMBERS = frozenset({"num_tokens_prompt_total", "num_tokens_generated"})


def _recognises(doc: Doc) -> bool:
    return any(count_of(doc.get(name)) is not None for name in _MEMBERS)


def _note(doc: Doc, notes: Notes) -> None:
    notes.identify(doc.get("model"), doc.get("id"))
    if _recognises(doc):
        notes.usage, notes.usage_final = doc, True
    notes.error = error_of(doc.get("error")) or notes.error


def _usage(usage: Doc, notes: Notes) -> Usage | None:
    return Usage(
        input_tokens=count_of(usage.get("num_tokens_prompt_total")),
        output_tokens=count_of(usage.get("num_tokens_generated")),
        model=notes.model,
    )


def _text(doc: Doc) -> Iterator[str]:
    for completion in objects_of(doc.get("completions")):
        yield from text_of(completion.get("completion"))


ALEPH_ALPHA_COMPLETE = Dialect("aleph-alpha.complete", _MEMBERS, _recognises, _note, _usage, _text)

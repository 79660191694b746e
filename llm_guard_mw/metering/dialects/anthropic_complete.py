"""Anthropic's older completions, also on Bedrock: `completion` and why it stopped. It reports no usage."""

from __future__ import annotations

from collections.abc import Iterator

from llm_guard_mw.metering.dialects.dialect import Dialect, Notes, error_of, text_of
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage

_MEMBERS = frozenset({"completion"})


def _recognises(doc: Doc) -> bool:
    return isinstance(doc.get("completion"), str)


def _note(doc: Doc, notes: Notes) -> None:
    notes.identify(doc.get("model"), doc.get("id") or doc.get("log_id"))
    notes.ended = notes.ended or isinstance(doc.get("stop_reason"), str)
    notes.error = error_of(doc.get("error")) or notes.error


def _usage(usage: Doc, notes: Notes) -> Usage | None:
    return None


def _text(doc: Doc) -> Iterator[str]:
    yield from text_of(doc.get("completion"))


ANTHROPIC_COMPLETE = Dialect("anthropic.complete", _MEMBERS, _recognises, _note, _usage, _text)

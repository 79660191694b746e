"""Hugging Face's text generation: a list of texts, or events of one token each. It reports no usage."""

from __future__ import annotations

from collections.abc import Iterator

from llm_guard_mw.metering.dialects.dialect import Dialect, Notes, error_of, object_of, text_of
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage

_MEMBERS = frozenset({"generated_text", "token"})


def _recognises(doc: Doc) -> bool:
    return isinstance(doc.get("generated_text"), str) or "text" in object_of(doc.get("token"))


def _note(doc: Doc, notes: Notes) -> None:
    notes.ended = notes.ended or isinstance(doc.get("generated_text"), str)
    notes.error = error_of(doc.get("error")) or notes.error


def _usage(usage: Doc, notes: Notes) -> Usage | None:
    return None


def _text(doc: Doc) -> Iterator[str]:
    token = object_of(doc.get("token"))
    yield from text_of(token.get("text") if token else doc.get("generated_text"))


HUGGINGFACE_GENERATE = Dialect("huggingface.generate", _MEMBERS, _recognises, _note, _usage, _text)

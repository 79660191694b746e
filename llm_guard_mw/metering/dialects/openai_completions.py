"""OpenAI's older completions: chat's frame around plain `text`."""

from __future__ import annotations

from collections.abc import Iterator

from llm_guard_mw.metering.dialects.dialect import Dialect, Notes, objects_of, text_of
from llm_guard_mw.metering.dialects.openai_chat import note_completion
from llm_guard_mw.metering.dialects.openai_tokens import read_tokens
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage


def _recognises(doc: Doc) -> bool:
    if doc.get("object") == "text_completion":
        return True
    return any(
        "text" in choice and "message" not in choice and "delta" not in choice
        for choice in objects_of(doc.get("choices"))
    )


def _usage(usage: Doc, notes: Notes) -> Usage | None:
    # A completion that wrote nothing leaves `completion_tokens` out; the total shows that it is 0.
    return read_tokens(usage, notes)


def _text(doc: Doc) -> Iterator[str]:
    for choice in objects_of(doc.get("choices")):
        yield from text_of(choice.get("text"))


_MEMBERS = frozenset({"object", "choices"})
OPENAI_COMPLETIONS = Dialect("openai.completions", _MEMBERS, _recognises, note_completion, _usage, _text)

"""Counting endpoints: they say how many tokens a request would have, cost nothing, and are never metered."""

from __future__ import annotations

from llm_guard_mw.metering.dialects.dialect import Dialect, Notes, count_of, error_of, no_text
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage

_MEMBERS = frozenset({"input_tokens", "totalTokens", "inputTokens"})
#: All that such an answer has. With anything else beside them, it is somebody's answer that also counts.
_ALL = _MEMBERS | {
    "object",
    "context_management",
    "totalBillableCharacters",
    "promptTokensDetails",
    "cachedContentTokenCount",
    "cacheTokensDetails",
}


def _recognises(doc: Doc) -> bool:
    return doc.keys() <= _ALL and any(count_of(doc.get(name)) is not None for name in _MEMBERS)


def _note(doc: Doc, notes: Notes) -> None:
    notes.error = error_of(doc.get("error")) or notes.error


def _usage(usage: Doc, notes: Notes) -> Usage | None:
    return None


COUNTING = Dialect("count_tokens", _MEMBERS, _recognises, _note, _usage, no_text)

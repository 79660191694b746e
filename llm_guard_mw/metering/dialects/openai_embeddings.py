"""OpenAI's embeddings: input only. Voyage says nothing but the total, which is the input."""

from __future__ import annotations

from dataclasses import replace

from llm_guard_mw.metering.dialects.dialect import Dialect, Notes, count_of, no_text, object_of, objects_of
from llm_guard_mw.metering.dialects.openai_chat import note_completion
from llm_guard_mw.metering.dialects.openai_tokens import read_tokens
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage

_OTHERS = frozenset({"prompt_tokens", "completion_tokens", "input_tokens", "output_tokens"})


def _recognises(doc: Doc) -> bool:
    first = next(objects_of(doc.get("data")), {})
    if doc.get("object") == "list" and (first.get("object") == "embedding" or "embedding" in first):
        return True
    # Rerankers say the total as well, and nothing else.
    usage = object_of(doc.get("usage"))
    return "total_tokens" in usage and _OTHERS.isdisjoint(usage) and "choices" not in doc


def _usage(usage: Doc, notes: Notes) -> Usage | None:
    read = read_tokens(usage, notes, output_follows=False)
    if read is not None and read.input_tokens is None:
        return replace(read, input_tokens=count_of(usage.get("total_tokens")))
    return read


_MEMBERS = frozenset({"object", "usage", "data"})
OPENAI_EMBEDDINGS = Dialect("openai.embeddings", _MEMBERS, _recognises, note_completion, _usage, no_text)

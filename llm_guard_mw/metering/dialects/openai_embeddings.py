"""OpenAI's embeddings: input only. Voyage says nothing but the total, which is the input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from llm_guard_mw.metering.dialects.dialect import Dialect, Notes, count_of, objects_of
from llm_guard_mw.metering.dialects.openai_chat import note_completion
from llm_guard_mw.metering.dialects.openai_tokens import read_tokens
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage


def _recognises(doc: Doc) -> bool:
    first = next(objects_of(doc.get("data")), {})
    return doc.get("object") == "list" and (first.get("object") == "embedding" or "embedding" in first)


def _usage(usage: Doc, notes: Notes) -> Usage | None:
    read = read_tokens(usage, notes, output_follows=False)
    if read is not None and read.input_tokens is None:
        return replace(read, input_tokens=count_of(usage.get("total_tokens")))
    return read


def _text(doc: Doc) -> Iterator[str]:
    yield from ()


OPENAI_EMBEDDINGS = Dialect("openai.embeddings", _recognises, note_completion, _usage, _text)

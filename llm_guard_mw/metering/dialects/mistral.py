"""What Mistral has beside OpenAI's formats: OCR, billed by the page, and conversations with tools of its own."""

from __future__ import annotations

from collections.abc import Iterator

from llm_guard_mw.metering.dialects.dialect import (
    Dialect,
    Notes,
    count_of,
    error_of,
    frozen_parts,
    no_text,
    object_of,
    objects_of,
    says_something,
    text_of,
)
from llm_guard_mw.metering.dialects.openai_tokens import read_tokens
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage


def _recognises_ocr(doc: Doc) -> bool:
    return "pages_processed" in object_of(doc.get("usage_info")) or (
        isinstance(doc.get("pages"), list) and "usage_info" in doc
    )


def _note_ocr(doc: Doc, notes: Notes) -> None:
    notes.identify(doc.get("model"), doc.get("id"))
    usage = object_of(doc.get("usage_info"))
    if says_something(usage):
        notes.usage, notes.usage_final = usage, True
    notes.error = error_of(doc.get("error")) or notes.error


def _usage_ocr(usage: Doc, notes: Notes) -> Usage | None:
    pages = count_of(usage.get("pages_processed"))
    return None if pages is None else Usage(model=notes.model, parts=frozen_parts({"pages": pages}))


def _is_conversation(doc: Doc) -> bool:
    kind = doc.get("type")
    return doc.get("object") == "conversation.response" or (
        isinstance(kind, str) and kind.startswith("conversation.response.")
    )


def _note_conversation(doc: Doc, notes: Notes) -> None:
    kind = doc.get("type")
    notes.ended = notes.ended or kind in ("conversation.response.done", "conversation.response.error")
    notes.identify(doc.get("model"), doc.get("conversation_id"))
    usage = object_of(doc.get("usage"))
    if says_something(usage):
        notes.usage, notes.usage_final = usage, True
    if kind == "conversation.response.error":
        notes.error = error_of({"code": doc.get("code") or "error"})
    notes.error = error_of(doc.get("error")) or notes.error


def _conversation_usage(usage: Doc, notes: Notes) -> Usage | None:
    return read_tokens(usage, notes)


def _conversation_text(doc: Doc) -> Iterator[str]:
    for item in (doc, *objects_of(doc.get("outputs"))):
        content = item.get("content")
        yield from text_of(content, item.get("name"), item.get("arguments"))
        for part in (*objects_of(content), object_of(content)):
            yield from text_of(part.get("text"))


MISTRAL_OCR = Dialect("mistral.ocr", frozenset({"usage_info"}), _recognises_ocr, _note_ocr, _usage_ocr, no_text)
MISTRAL_CONVERSATION = Dialect(
    "mistral.conversation",
    frozenset({"object", "type"}),
    _is_conversation,
    _note_conversation,
    _conversation_usage,
    _conversation_text,
)

"""OpenAI's chat completions, spoken by nearly everyone: one JSON object, or a stream of chunks up to `[DONE]`."""

from __future__ import annotations

from collections.abc import Iterator

from llm_guard_mw.metering.dialects.dialect import (
    Dialect,
    Notes,
    error_of,
    object_of,
    objects_of,
    says_something,
    text_of,
)
from llm_guard_mw.metering.dialects.openai_tokens import read_tokens
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage


def _recognises(doc: Doc) -> bool:
    kind = doc.get("object")
    if isinstance(kind, str) and kind.startswith("chat.completion"):
        return True
    if any("message" in choice or "delta" in choice for choice in objects_of(doc.get("choices"))):
        return True
    return "prompt_tokens" in object_of(doc.get("usage"))


def note_completion(doc: Doc, notes: Notes) -> None:
    """What a chunk or a whole body says; the older completions are alike."""
    usage = doc.get("usage")
    if not isinstance(usage, dict) or not says_something(usage):
        usage = object_of(object_of(doc.get("x_groq")).get("usage"))
    # Mistral has the tier inside the usage.
    notes.identify(doc.get("model"), doc.get("id"), doc.get("service_tier") or usage.get("service_tier"))
    error = error_of(doc.get("error"))
    choices = doc.get("choices")
    # Perplexity and vLLM count along in every chunk. The last one has no choices, or ends them.
    over = not choices
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict):
            reason = choice.get("finish_reason")
            over = over or bool(reason)
            error = error or error_of(choice.get("error"))
            if not usage and isinstance(choice.get("usage"), dict):
                usage = choice["usage"]  # Moonshot's streams have it there
            if reason == "error":
                error = error or "error"
    if says_something(usage):
        notes.usage, notes.usage_final = usage, over
    if error is not None:
        notes.error = error


def _usage(usage: Doc, notes: Notes) -> Usage | None:
    return read_tokens(usage, notes)


def _text(doc: Doc) -> Iterator[str]:
    for choice in objects_of(doc.get("choices")):
        message = choice.get("message") if isinstance(choice.get("message"), dict) else choice.get("delta")
        yield from _message_text(object_of(message))


def _message_text(message: Doc) -> Iterator[str]:
    # Two names for the same thinking, and some servers send both.
    yield from text_of(message.get("reasoning_content") or message.get("reasoning"))
    content = message.get("content")
    yield from text_of(content, message.get("refusal"))
    for part in objects_of(content):
        yield from text_of(part.get("text"))
        for thought in objects_of(part.get("thinking")):
            yield from text_of(thought.get("text"))
    calls = [object_of(call.get("function")) for call in objects_of(message.get("tool_calls"))]
    for call in [*calls, object_of(message.get("function_call"))]:
        yield from text_of(call.get("name"), call.get("arguments"))


_MEMBERS = frozenset({"object", "choices", "usage", "x_groq"})
OPENAI_CHAT = Dialect("openai.chat", _MEMBERS, _recognises, note_completion, _usage, _text)

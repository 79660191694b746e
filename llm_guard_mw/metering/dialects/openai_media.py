"""OpenAI's sound and images: transcriptions, speech, generated images; one JSON object, or events up to a `done`.

Newer models are billed by tokens, older transcriptions by the second, and the oldest say nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from llm_guard_mw.metering.dialects.dialect import (
    Dialect,
    Notes,
    count_of,
    error_of,
    no_text,
    object_of,
    objects_of,
    rounded_up,
    says_something,
    text_of,
)
from llm_guard_mw.metering.dialects.openai_tokens import read_tokens
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage

_MEMBERS = frozenset({"type", "usage", "data"})
_COUNTS = frozenset({"input_tokens", "prompt_tokens", "total_tokens", "seconds"})
_AUDIO_EVENTS = ("transcript.", "transcription.", "speech.audio.")
_IMAGE_EVENTS = ("image_generation.", "image_edit.")
_IMAGES = ("b64_json", "url", "revised_prompt")


def _recognises_audio(doc: Doc) -> bool:
    kind = doc.get("type")
    if isinstance(kind, str) and kind.startswith(_AUDIO_EVENTS):
        return True
    return isinstance(doc.get("text"), str) and not _COUNTS.isdisjoint(object_of(doc.get("usage")))


def _recognises_images(doc: Doc) -> bool:
    kind = doc.get("type")
    if isinstance(kind, str) and kind.startswith(_IMAGE_EVENTS):
        return True
    first = next(objects_of(doc.get("data")), {})
    return any(name in first for name in _IMAGES)


def _note(doc: Doc, notes: Notes) -> None:
    kind = doc.get("type")
    over = isinstance(kind, str) and kind.endswith((".done", ".completed"))
    # Of several images each has its own end; the stream's is [DONE] or the last of them.
    notes.ended = notes.ended or over
    usage = object_of(doc.get("usage"))
    notes.identify(doc.get("model"), doc.get("id"), usage.get("service_tier"))
    if says_something(usage) or rounded_up(usage.get("seconds")) is not None:
        notes.usage, notes.usage_final = usage, True
    notes.error = error_of(doc.get("error")) or notes.error


def _usage(usage: Doc, notes: Notes) -> Usage | None:
    read = read_tokens(usage, notes)
    if read is None and count_of(usage.get("cost_in_usd_ticks")) is not None:
        return Usage(model=notes.model)  # xAI says of images only what they cost: a usage, though none to be counted
    return read


def _text(doc: Doc) -> Iterator[str]:
    kind = doc.get("type")
    if isinstance(kind, str) and kind.startswith(_AUDIO_EVENTS):
        if kind.endswith(".delta"):
            yield from text_of(doc.get("delta"))
        return
    yield from text_of(doc.get("text"))


OPENAI_AUDIO = Dialect("openai.audio", _MEMBERS, _recognises_audio, _note, _usage, _text)
OPENAI_IMAGES = Dialect("openai.images", _MEMBERS, _recognises_images, _note, _usage, no_text)

"""What a request asks and what is written for it, whatever the wire."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_PROSE = (
    "the budget holds a small account open while every careful answer arrives and what was not used "
    "goes back to whoever asked for it so that the books add up at night"
)
_VOCABULARY = tuple(_PROSE.split())
REASONING_MODELS = re.compile(r"^(o\d|gpt-5|gemini-2\.5-pro|gemini-2\.5-flash$|gemini-3)")
_ASKED_WORDS = re.compile(r"\b(\d{1,5}) words\b")
#: Strings under these names are not text that a model reads.
_NOT_TEXT = frozenset({"type", "role", "id", "data", "url", "image_url", "mimeType", "mime_type", "media_type"})

# A request's and a reply's bodies are foreign JSON, hence Any.
Body = dict[str, Any]
Piece = tuple[bytes, int]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a request asks."""

    model: str
    texts: tuple[str, ...]
    messages: int = 1
    cap: int | None = None
    choices: int = 1
    stream: bool = False
    include_usage: bool = False
    sse: bool = True  # Gemini: without `alt=sse` a stream is one JSON array
    marks_cache: bool = False  # Anthropic: the caller marks what may be cached
    reasons: bool = False
    base64: bool = False  # embeddings as packed floats
    dimensions: int = 1536
    extra_tokens: int = 0  # input that comes as token numbers
    words: int | None = None  # how long the reply is, if a test says so

    @property
    def input_tokens(self) -> int:
        return sum(len(text.split()) for text in self.texts) + 3 * self.messages + self.extra_tokens


@dataclass(frozen=True, slots=True)
class Reply:
    """What was written, and what it is worth. Token counts are inclusive totals."""

    id: str
    at: int  # seconds since the epoch
    choices: tuple[tuple[str, ...], ...]
    cut: bool  # the cap ended it
    input_tokens: int
    reasoning_tokens: int = 0  # of each choice
    cached_tokens: int = 0
    cache_write_tokens: int = 0

    @property
    def output_tokens(self) -> int:
        return sum(len(words) + self.reasoning_tokens for words in self.choices)

    def text(self, choice: int = 0) -> str:
        return "".join(self.choices[choice])


@dataclass(frozen=True, slots=True)
class Wire:
    """One endpoint's format. `pieces` is None where nothing streams."""

    api: str
    parse: Callable[[Body, str | None], Prompt]
    whole: Callable[[Prompt, Reply], Body]
    pieces: Callable[[Prompt, Reply], Iterator[Piece]] | None = None
    writes: bool = True  # False: embeddings
    counts: bool = True  # False: token counting, which costs nothing


def write(prompt: Prompt, *, cached_tokens: int = 0, cache_write_tokens: int = 0) -> Reply:
    """The reply to a prompt: its own first words, then words chosen by a digest of it, until the length or the cap."""
    digest = hashlib.sha256("\0".join((prompt.model, *prompt.texts)).encode()).digest()
    asked = _ASKED_WORDS.search(prompt.texts[-1]) if prompt.texts else None
    length = prompt.words or (int(asked[1]) if asked else 24 + digest[0] % 72)
    reasoning = 16 * (1 + digest[1] % 6) if prompt.reasons else 0
    room = length if prompt.cap is None else prompt.cap
    reasoning = min(reasoning, room) if prompt.cap is not None else reasoning
    room = length if prompt.cap is None else min(length, prompt.cap - reasoning)

    opening = prompt.texts[-1].split()[:6] if prompt.texts else []
    choices: list[tuple[str, ...]] = []
    for number in range(prompt.choices):
        chosen = [_VOCABULARY[digest[(i * 7 + number) % 32] % len(_VOCABULARY)] for i in range(length)]
        words = ("You", "asked:", *opening, *chosen)[:room]
        choices.append(tuple(word if i == 0 else f" {word}" for i, word in enumerate(words)))
    return Reply(
        id=secrets.token_hex(12),
        at=int(time.time()),
        choices=tuple(choices),
        cut=room < length,
        input_tokens=prompt.input_tokens,
        reasoning_tokens=reasoning,
        cached_tokens=cached_tokens,
        cache_write_tokens=cache_write_tokens,
    )


def texts_of(value: Any) -> Iterator[str]:
    """All strings that a model would read, in order, however they are nested."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in _NOT_TEXT:
                yield from texts_of(item)


def count_of(value: Any) -> int:
    return len(value) if isinstance(value, list) else 1


def sse(data: Body | str, event: str | None = None) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return (f"event: {event}\n" if event else "").encode() + f"data: {text}\n\n".encode()


def vector(text: str, dimensions: int) -> list[float]:
    """A point of length one, always the same for the same text."""
    block = hashlib.sha256(text.encode()).digest()
    raw = [block[i % 32] - 127.5 for i in range(dimensions)]
    length = sum(x * x for x in raw) ** 0.5
    return [x / length for x in raw]

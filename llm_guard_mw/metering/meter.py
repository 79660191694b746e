"""The meter: shown an answer's bytes as they pass, it says what the provider counted.

Rule 1. `feed` only keeps a copy: the first megabyte, and a rolling tail behind it. All reading is done in `finish`,
        when the caller has its bytes already. So a chunk costs next to nothing, and chunking cannot change a Reading.
Rule 2. Nothing here raises. What goes wrong inside is named in `Reading.broken`.
Rule 3. The usage stands at the start or at the end of every format that is read here, so a lost middle loses text
        and never a number. Of a document whose start is lost, the last members are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

from llm_guard_mw.metering import sse
from llm_guard_mw.metering.decoding import GZIP_MAGIC, Undecodable, decoder_for
from llm_guard_mw.metering.dialects import DIALECTS, Dialect, Notes
from llm_guard_mw.metering.loose_json import Doc, parse, parse_each, read_cut, read_end
from llm_guard_mw.model import Reading, Usage

HEAD_BYTES: Final = 1024 * 1024
TAIL_BYTES: Final = 128 * 1024

#: Of the events that may tell something, so many are parsed: the first (Anthropic's start), and the last.
_FIRST_EVENTS = 4
_LAST_EVENTS = 12
#: The protocol's end mark is among the last events; a gateway may add one of its own.
_CLOSING_EVENTS = 3

_PROVIDERS = {"gemini": "google"}
_BINARY = re.compile(r"(?:image|audio|video|font)/|application/(?:pdf|zip|gzip|x-tar|octet-stream|vnd\.)", re.I)
_BLANK = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"


class Meter:
    """Watches one answer.

        meter = Meter("openai.chat", provider="openai", content_type="text/event-stream")
        for chunk in answer:
            meter.feed(chunk)
        reading = meter.finish()

    `api` and `provider` are the names of the corpus; "auto", None and unknown names are recognised by the body.
    """

    def __init__(
        self,
        api: str | None,
        *,
        provider: str | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        request_model: str | None = None,
    ) -> None:
        self._api = api
        self._provider = _PROVIDERS.get(provider, provider) if provider else None
        self._content_type = content_type or _header(headers, "content-type") or ""
        self._status = status
        self._request_model = request_model
        self._kept = _Kept()
        self._broken: str | None = None
        self._reading: Reading | None = None
        self._decoder = None
        self._keep: Callable[[bytes], None] = self._kept.add
        try:
            self._decoder = decoder_for(content_encoding or _header(headers, "content-encoding"))
        except Undecodable as error:
            self._give_up(str(error))
        if self._decoder is not None:
            self._keep = self._decode

    def feed(self, chunk: bytes) -> None:
        """Show the next bytes, as they came off the wire."""
        try:
            self._keep(chunk)
        except Exception as error:  # a fault of ours must never reach the caller's answer
            self._give_up(f"{type(error).__name__} in feed")

    def finish(self) -> Reading:
        """What is known now that the bytes have ended. Asked again, it says the same."""
        if self._reading is None:
            try:
                self._reading = self._read()
            except Exception as error:
                self._reading = Reading(broken=self._broken or f"{type(error).__name__} in finish")
            self._kept = _Kept()
            self._keep = _ignore
        return self._reading

    # -- feeding

    def _decode(self, chunk: bytes) -> None:
        assert self._decoder is not None  # noqa: S101 - for the type checker: set before this became `_keep`
        try:
            for piece in self._decoder.decode(chunk):
                self._kept.add(piece)
        except Undecodable as error:
            self._give_up(str(error))

    def _give_up(self, why: str) -> None:
        self._broken = self._broken or why
        self._keep = _ignore

    # -- reading

    def _read(self) -> Reading:
        if self._decoder is not None:
            for piece in self._decoder.flush():
                self._kept.add(piece)
        elif self._kept.starts_with(GZIP_MAGIC) and self._broken is None:
            return self._read_undeclared_gzip()
        head, tail = self._kept.pieces()
        if head.startswith(_BOM):
            head = head[len(_BOM) :]
        head = head.lstrip(_BLANK)
        if head[:1] in (b"{", b"["):
            answer = _read_json(head, tail)
        elif sse.looks_like_events(head):
            answer = _read_events(head, tail)
        else:
            return Reading(text=self._plain_text(head, tail), broken=self._broken)
        return self._judge(answer)

    def _read_undeclared_gzip(self) -> Reading:
        """Some recorders and proxies lose the Content-Encoding header."""
        head, tail = self._kept.pieces()
        inner = Meter(
            self._api,
            provider=self._provider,
            content_type=self._content_type,
            content_encoding="gzip",
            status=self._status,
            request_model=self._request_model,
        )
        inner.feed(head)
        reading = inner.finish()
        return reading if tail is None else replace(reading, ended=False)

    def _judge(self, answer: _Answer) -> Reading:
        dialect = _dialect_of(self._api, answer.docs)
        if dialect is None:
            text = answer.own_text() if self._status < 400 else None
            return Reading(ended=answer.closed, text=text, broken=self._broken)
        notes = Notes(provider=self._provider, model=self._request_model)
        for doc in answer.docs:
            dialect.note(doc, notes)
        ended = (notes.ended or answer.closed) and not notes.pending
        usage = dialect.usage(notes.usage, notes) if notes.usage is not None else None
        final = usage is not None and (notes.usage_final or ended)
        if usage is not None and not final:
            usage = replace(usage, exact=False)
        text = None
        if not final and self._status < 400:
            text = "".join(piece for doc in answer.every_doc() for piece in dialect.text(doc))
        return Reading(
            usage=usage,
            # What was lost on the way was written too: then `text` is not all there was.
            ended=ended and (final or not answer.lossy),
            text=text,
            response_id=notes.response_id,
            service_tier=notes.service_tier,
            error=notes.error,
            broken=self._broken,
        )

    def _plain_text(self, head: bytes, tail: bytes | None) -> str | None:
        if self._broken is not None or self._status >= 400:
            return None
        return _text_or_none(head + (tail or b""), self._content_type)


def read_usage(
    api: str,
    response_body: bytes,
    *,
    content_type: str | None = None,
    request_body: bytes = b"",
    provider: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Usage | None:
    """What a provider's recorded answer says that it used; None if it says nothing.

    `api` and `provider` are names like "openai.chat" and "azure"; "auto" and unknown names are recognised by the
    shape of the body. The body may be plain JSON, an event stream or a JSON array, also compressed.
    """
    asked = parse(request_body) if request_body else None
    model = asked.get("model") if isinstance(asked, dict) else None
    meter = Meter(
        api,
        provider=provider,
        content_type=content_type,
        headers=headers,
        request_model=model if isinstance(model, str) else None,
    )
    meter.feed(response_body)
    return meter.finish().usage


# ---------------------------------------------------------------- what is kept of the bytes


class _Kept:
    """The first megabyte, and of what follows the last bit."""

    __slots__ = ("_head", "_lost", "_room", "_tail")

    def __init__(self) -> None:
        self._head = bytearray()
        self._tail = bytearray()
        self._room = HEAD_BYTES
        self._lost = False

    def add(self, chunk: bytes) -> None:
        room = self._room = self._room - len(chunk)
        if room >= 0:
            self._head += chunk
        else:
            self._overflow(chunk)

    def _overflow(self, chunk: bytes) -> None:
        here = max(0, self._room + len(chunk))
        self._room = -1
        self._head += chunk[:here]
        self._tail += chunk[max(here, len(chunk) - TAIL_BYTES) :]
        self._lost = self._lost or len(chunk) - here > TAIL_BYTES
        if len(self._tail) > 2 * TAIL_BYTES:  # not at each chunk: moving the tail costs its length
            self._cut_tail()

    def _cut_tail(self) -> None:
        if len(self._tail) > TAIL_BYTES:
            del self._tail[:-TAIL_BYTES]
            self._lost = True

    def starts_with(self, magic: bytes) -> bool:
        return self._head.startswith(magic)

    def pieces(self) -> tuple[bytes, bytes | None]:
        """All bytes and None; or, where some were lost between them, the first and the last."""
        self._cut_tail()
        if self._lost:
            return bytes(self._head), bytes(self._tail)
        return bytes(self._head + self._tail), None


def _ignore(chunk: bytes) -> None:
    """What a meter does with bytes once it has given up or has finished."""


# ---------------------------------------------------------------- what the bytes are


@dataclass(frozen=True, slots=True)
class _Answer:
    """The documents of an answer that may tell something, and how to come by all of them."""

    docs: list[Doc]
    closed: bool  # the framing's own end was seen: the last bracket, or `[DONE]`
    lossy: bool  # bytes between the first and the last were not kept
    every_doc: Callable[[], Iterator[Doc]]
    own_text: Callable[[], str | None]  # what to count if this is no provider's format


def _read_json(head: bytes, tail: bytes | None) -> _Answer:
    whole = parse(head) if tail is None else None
    docs: list[Doc]
    if isinstance(whole, dict):
        docs, closed = [whole], True
    elif isinstance(whole, list):
        docs, closed = [doc for doc in whole if isinstance(doc, dict)], True
    else:
        docs, closed = _read_broken_json(head, tail)
    return _Answer(
        docs=docs,
        closed=closed,
        lossy=tail is not None,
        every_doc=lambda: iter(docs),
        own_text=lambda: _text_or_none(head + (tail or b""), ""),
    )


def _read_broken_json(head: bytes, tail: bytes | None) -> tuple[list[Doc], bool]:
    """Of a body that is too large, cut off, several values in a row, or not quite JSON: what can be read of it."""
    docs, closed = parse_each(head) if tail is None else ([], False)
    if closed:
        return docs, True
    end = (head if tail is None else tail)[-TAIL_BYTES:]
    last = read_end(end)
    if last is not None:
        return [*docs, last], True
    if not docs:
        last = read_cut(end)
    return ([*docs, last] if last is not None else docs), False


def _read_events(head: bytes, tail: bytes | None) -> _Answer:
    events = sse.split(head) + (sse.split(tail) if tail is not None else [])
    telling = [at for at, event in enumerate(events) if b'"usage' in event or b'"error"' in event]
    first, closing = _ends(events)
    chosen = sorted({*first, *telling[:_FIRST_EVENTS], *telling[-_LAST_EVENTS:], *closing})
    docs = [doc for at in chosen for doc in _documents(sse.payload(events[at]), last=at == chosen[-1])]
    done = any(sse.payload(events[at]).strip() == b"[DONE]" for at in closing)
    return _Answer(
        docs=docs,
        closed=done,
        lossy=tail is not None,
        every_doc=lambda: (doc for event in events for doc in _documents(sse.payload(event), last=False)),
        own_text=lambda: _join_text(events),
    )


def _ends(events: list[bytes]) -> tuple[list[int], list[int]]:
    """Where the first event with data stands, and where the last few do."""
    spoken = (at for at in range(len(events)) if sse.payload(events[at]))
    from_behind = (at for at in range(len(events) - 1, -1, -1) if sse.payload(events[at]))
    return list(islice(spoken, 1)), list(islice(from_behind, _CLOSING_EVENTS))


def _documents(data: bytes, *, last: bool) -> Iterator[Doc]:
    """The object in an event's data. Some servers leave out the empty lines: then there is one on each line."""
    if b"{" not in data:
        return
    doc = parse(data)
    if isinstance(doc, dict):
        yield doc
    elif doc is None and b"\n" in data:
        for line in data.split(b"\n"):
            doc = parse(line)
            if isinstance(doc, dict):
                yield doc
    elif doc is None and last:
        end = read_end(data[-TAIL_BYTES:])  # a last event of which the start was lost
        if end is not None:
            yield end


def _dialect_of(api: str | None, docs: list[Doc]) -> Dialect | None:
    """The named format if it fits, else the first that recognises what came."""
    named = DIALECTS.get(api or "")
    if named is not None and any(named.recognises(doc) for doc in docs):
        return named
    for doc in docs:
        for dialect in DIALECTS.values():
            if dialect.recognises(doc):
                return dialect
    # An error has no shape of its own.
    return named if any(doc.get("error") for doc in docs) else None


# ---------------------------------------------------------------- text to be counted


def _text_or_none(body: bytes, content_type: str) -> str | None:
    if _BINARY.match(content_type) or b"\x00" in body[:4096]:
        return None
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        if error.start >= len(body) - 3 or content_type.lower().startswith("text/"):
            return body.decode("utf-8", "replace")  # cut within a character, or another charset
        return None


def _join_text(events: list[bytes]) -> str | None:
    data = [sse.payload(event) for event in events]
    return "".join(piece.decode("utf-8", "replace") for piece in data if piece.strip() != b"[DONE]")


def _header(headers: Mapping[str, str] | None, name: str) -> str | None:
    if headers is None:
        return None
    return next((value for key, value in headers.items() if key.lower() == name), None)

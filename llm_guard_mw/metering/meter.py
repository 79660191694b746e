"""The meter: shown an answer's bytes as they pass, it says what the provider counted.

Rule 1. `feed` only keeps a copy: the first megabyte, and a rolling tail behind it. All reading is done in `finish`,
        when the caller has its bytes already. So a chunk costs next to nothing, and chunking cannot change a Reading.
Rule 2. Nothing here raises. What goes wrong inside is named in `Reading.broken`.
Rule 3. The usage stands at the start or at the end of every format that is read here, so a lost middle loses text
        and never a number. Of a document whose start is lost, the last members are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Final

from llm_guard_mw.metering import sse
from llm_guard_mw.metering.decoding import GZIP_MAGIC, Undecodable, decoder_for
from llm_guard_mw.metering.dialects import DIALECTS, Dialect, Notes
from llm_guard_mw.metering.loose_json import Doc, parse, parse_each, read_cut, read_end
from llm_guard_mw.model import Reading, Usage

HEAD_BYTES: Final = 1024 * 1024
TAIL_BYTES: Final = 128 * 1024

#: So many documents of a stream are read at first: Anthropic's start is there, every format's usage and end mark,
#: and what a gateway may have put around them. If they leave the usage open, all are read.
_FIRST_DOCS = 3
_LAST_DOCS = 4

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
        self._take(self._decoder.decode(chunk))

    def _take(self, pieces: Iterator[bytes]) -> None:
        try:
            for piece in pieces:
                self._kept.add(piece)
        except Undecodable as error:
            self._give_up(str(error))

    def _give_up(self, why: str) -> None:
        self._broken = self._broken or why
        self._keep = _ignore

    # -- reading

    def _read(self) -> Reading:
        if self._decoder is not None and self._broken is None:
            self._take(self._decoder.flush())
        elif self._broken is None and self._kept.starts_with(GZIP_MAGIC):
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
            text = self._plain_text(head, tail)
            ended = text is not None and tail is None and self._is_the_apps_own()
            return Reading(ended=ended, text=text, broken=self._broken)
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
        dialect = _dialect_of(self._api, answer)
        if dialect is None:
            text = answer.own_text() if self._status < 400 else None
            ended = answer.closed or (answer.endless and self._is_the_apps_own() and not answer.lossy)
            return Reading(ended=ended, text=text, broken=self._broken)
        notes = self._notes_of(dialect, answer.docs)
        if answer.all_docs is not None and not notes.usage_final:
            notes = self._notes_of(dialect, answer.every_doc())
        ended = (notes.ended or answer.closed) and not notes.pending
        usage = dialect.usage(notes.usage, notes) if notes.usage is not None else None
        final = usage is not None and (notes.usage_final or ended) and not answer.guessed
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

    def _notes_of(self, dialect: Dialect, docs: Iterable[Doc]) -> Notes:
        notes = Notes(provider=self._provider, model=self._request_model)
        for doc in docs:
            dialect.note(doc, notes)
        return notes

    def _is_the_apps_own(self) -> bool:
        """Nobody said that this is a provider's answer: then it ends where its bytes do, as far as a meter can tell."""
        return self._api not in DIALECTS

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
    """The documents of an answer that most likely tell everything, and how to come by all of them."""

    own_text: Callable[[], str | None]  # what to count if this is no provider's format
    docs: list[Doc] = field(default_factory=list)
    all_docs: Callable[[], Iterator[Doc]] | None = None  # None: `docs` are all
    closed: bool = False  # the framing's own end was seen: the last bracket, or `[DONE]`
    endless: bool = False  # of a framing that has no end mark of its own
    lossy: bool = False  # bytes between the first and the last were not kept
    partial: bool = False  # some of the documents are only the last members of one
    guessed: bool = False  # the usage stood in front of a cut: its level within the document cannot be told

    def every_doc(self) -> Iterator[Doc]:
        return iter(self.docs) if self.all_docs is None else self.all_docs()


def _read_json(head: bytes, tail: bytes | None) -> _Answer:
    answer = _Answer(own_text=lambda: _text_or_none(head + (tail or b""), ""), lossy=tail is not None)
    whole = parse(head) if tail is None else None
    if isinstance(whole, dict):
        return replace(answer, docs=[whole], closed=True)
    if isinstance(whole, list):
        return replace(answer, docs=[doc for doc in whole if isinstance(doc, dict)], closed=True)
    # Too large, cut off, several values in a row, or not quite JSON: what can be read of it?
    docs, closed = parse_each(head) if tail is None else ([], False)
    if closed:
        return replace(answer, docs=docs, closed=True)
    end = (head if tail is None else tail)[-TAIL_BYTES:]
    last = read_end(end)
    if last is not None:
        return replace(answer, docs=[*docs, last], closed=True, partial=True)
    if not docs and not end.rstrip().endswith((b"}", b"]")):
        last = read_cut(end)
        if last is not None:
            return replace(answer, docs=[last], partial=True, guessed=True)
    return replace(answer, docs=docs)


def _read_events(head: bytes, tail: bytes | None) -> _Answer:
    head = sse.normal(head)
    end = head if tail is None else sse.normal(tail)
    first, behind = _opening(head)
    last, more = _closing(end, behind if tail is None else 0)
    # The first event of the tail has lost its start. If it was a large one, it may be the one that counts.
    cut = None if tail is None else read_end(end.partition(b"\n\n")[0])
    between = [] if cut is None else [cut]
    pieces = (head,) if tail is None else (head, end)

    def all_docs() -> Iterator[Doc]:
        return chain(_documents(_data_of(head)), between, _documents(_data_of(*pieces[1:])))

    return _Answer(
        docs=[*_documents(first), *between, *_documents(last)],
        all_docs=all_docs if more or tail is not None else None,
        endless=True,
        partial=cut is not None,
        closed=any(_is_done(data) for data in first + last),
        lossy=tail is not None,
        own_text=lambda: _join_text(_data_of(*pieces)),
    )


def _is_done(data: bytes) -> bool:
    return data[-16:].rpartition(b"\n")[2].strip() == b"[DONE]"


def _opening(data: bytes) -> tuple[list[bytes], int]:
    """What the first events say, and the position behind them."""
    found = list(islice(sse.forward(data), _FIRST_DOCS))
    return [said for said, _ in found], found[-1][1] if found else len(data)


def _closing(data: bytes, start: int) -> tuple[list[bytes], bool]:
    """What the last events behind `start` say, in order, and whether there are more before them."""
    found = list(islice(sse.backward(data, start), _LAST_DOCS))
    return [said for said, _ in reversed(found) if said], bool(found) and found[-1][1] > start


def _data_of(*pieces: bytes) -> Iterator[bytes]:
    return (said for piece in pieces for said, _ in sse.forward(piece))


def _documents(events: Iterable[bytes]) -> Iterator[Doc]:
    """The objects in what events say. Some servers leave out the empty lines: then there is one on each line."""
    for data in events:
        if b"{" not in data:
            continue
        doc = parse(data)
        if isinstance(doc, dict):
            yield doc
        elif doc is None and b"\n" in data:
            yield from (doc for doc in map(parse, data.split(b"\n")) if isinstance(doc, dict))


def _dialect_of(api: str | None, answer: _Answer) -> Dialect | None:
    """The named format if it fits, else the first that recognises what came."""
    named = DIALECTS.get(api or "")
    docs = answer.docs[:_FIRST_DOCS] + answer.docs[-_LAST_DOCS:]
    if named is not None and (answer.partial or any(named.recognises(doc) for doc in docs)):
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


def _join_text(data: Iterable[bytes]) -> str:
    return "".join(said.removesuffix(b"[DONE]").decode("utf-8", "replace") for said in data)


def _header(headers: Mapping[str, str] | None, name: str) -> str | None:
    if headers is None:
        return None
    return next((value for key, value in headers.items() if key.lower() == name), None)

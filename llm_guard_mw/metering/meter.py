"""The meter: shown an answer's bytes as they pass, it says what the provider counted.

Rule 1. `feed` only keeps a copy: the first megabyte, and a rolling tail behind it. All reading is done in `finish`,
        when the caller has its bytes already. So a chunk costs next to nothing, and chunking cannot change a Reading.
Rule 2. Nothing here raises. What goes wrong inside is named in `Reading.broken`.
Rule 3. The usage stands at the start or at the end of every format that is read here, so a lost middle loses text
        and never a number. Of a document whose start is lost, the last members are read.
Rule 4. What costs nothing is not metered: an answer of a counting endpoint, and a stored response that is fetched
        again. `read_usage` says what the body says all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Final

from msgspec.structs import replace as amended

from llm_guard_mw.metering.billed import BilledResponses
from llm_guard_mw.metering.decoding import GZIP_MAGIC, Decoder, Undecodable, decoder_for
from llm_guard_mw.metering.dialects import COUNTING, DIALECTS, Dialect, Notes, recognised
from llm_guard_mw.metering.dialects.bedrock_invoke import counted_by_bedrock, counts_in, metrics_in
from llm_guard_mw.metering.framing import Answer, read_answer, text_or_none
from llm_guard_mw.metering.kept import Kept
from llm_guard_mw.metering.loose_json import Doc, parse
from llm_guard_mw.model import Reading, Usage

#: Answers that repeat a usage which an earlier answer may have said.
_RETRIEVES = frozenset(
    {
        "openai.responses.retrieve",
        "openai.responses.cancel",
        "openai.chat.stored",
        "gemini.interactions.retrieve",
        "gemini.interactions.cancel",
    }
)
#: Answers that may be fetched again.
_STORED = _RETRIEVES | {"openai.responses", "gemini.interactions"}

_PROVIDERS = {"gemini": "google"}
_MODEL_FIELDS: Final = ("model", "model_id", "modelId")
_BLANK = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"


class Meter:
    """Watches one answer.

        meter = Meter("openai.chat", provider="openai", content_type="text/event-stream")
        for chunk in answer:
            meter.feed(chunk)
        reading = meter.finish()

    `api` and `provider` are the names of the corpus; "auto", None and unknown names are recognised by the body.
    `billed` is what the meters of a process have in common: it knows the stored responses that were metered already.
    """

    __slots__ = (
        "_api",
        "_billed",
        "_broken",
        "_content_type",
        "_decoder",
        "_headers",
        "_keep",
        "_kept",
        "_provider",
        "_reading",
        "_request_model",
        "_status",
    )

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
        billed: BilledResponses | None = None,
    ) -> None:
        self._api = api
        self._provider = _PROVIDERS.get(provider, provider) if provider else None
        self._content_type = content_type
        self._status = status
        self._headers = headers
        self._request_model = request_model
        self._billed = billed
        self._kept = Kept()
        self._broken: str | None = None
        self._reading: Reading | None = None
        self._decoder: Decoder | None = None
        self._keep: Callable[[bytes], None] = self._kept.add
        if content_encoding is None and headers:
            content_encoding = _header(headers, "content-encoding")
        if content_encoding:
            self._decode_as(content_encoding)

    def feed(self, chunk: bytes) -> None:
        """Show the next bytes, as they came off the wire."""
        keep = self._keep  # called as an attribute it would be looked up as a method first, which takes as long again
        try:
            keep(chunk)
        except Exception as error:  # a fault of ours must never reach the caller's answer
            self._give_up(f"{type(error).__name__} in feed")

    def finish(self) -> Reading:
        """What is known now that the bytes have ended. Asked again, it says the same."""
        if self._reading is None:
            try:
                self._reading = self._read()
            except Exception as error:
                self._reading = Reading(broken=self._broken or f"{type(error).__name__} in finish")
            self._kept = _NOTHING
            self._keep = _ignore
        return self._reading

    # -- feeding

    def _decode_as(self, content_encoding: str) -> None:
        try:
            self._decoder = decoder_for(content_encoding)
        except Undecodable as error:
            self._give_up(str(error))
        if self._decoder is not None:
            self._keep = self._decode

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
        head, tail = self._kept.pieces()
        if not head.startswith(b"{"):
            if head.startswith(GZIP_MAGIC) and self._decoder is None and self._broken is None:
                return self._read_undeclared_gzip(head, tail)
            head = head.removeprefix(_BOM).lstrip(_BLANK)
        answer = read_answer(head, tail)
        if answer is not None:
            return self._judge(answer, head, tail)
        text = self._plain_text(head, tail)
        ended = text is not None and tail is None and self._is_the_apps_own()
        usage = self._filled(None, None)
        return Reading(usage, ended or usage is not None, text, None, None, None, self._broken)

    def _read_undeclared_gzip(self, head: bytes, tail: bytes | None) -> Reading:
        """Some recorders and proxies lose the Content-Encoding header."""
        inner = Meter(
            self._api,
            provider=self._provider,
            content_type=self._content_type,
            content_encoding="gzip",
            status=self._status,
            headers=self._headers,
            request_model=self._request_model,
            billed=self._billed,
        )
        inner.feed(head)
        reading = inner.finish()
        return reading if tail is None else amended(reading, ended=False)

    def _judge(self, answer: Answer, head: bytes, tail: bytes | None) -> Reading:
        dialect = _dialect_of(self._api, answer)
        if dialect is None:
            return self._judge_unknown(answer, head, tail)
        notes = self._notes_of(dialect, answer.docs)
        if answer.all_docs is not None and not notes.usage_final:
            notes = self._notes_of(dialect, answer.all_docs())
        if dialect is COUNTING:
            return Reading(None, True, None, error=notes.error, broken=self._broken, free="counting")
        ended = (notes.ended or answer.closed) and not notes.pending
        usage = None if notes.usage is None else dialect.usage(notes.usage, notes)
        if usage is None or usage.input_tokens is None or usage.output_tokens is None:
            metrics = metrics_in(answer.docs)
            usage, ended = self._filled(usage, metrics), ended or metrics is not None
        final = usage is not None and (notes.usage_final or ended) and not answer.guessed
        text = None
        if not final:
            if usage is not None:
                usage = replace(usage, exact=False)
            if self._status < 400:
                text = "".join(piece for doc in answer.every_doc() for piece in dialect.text(doc))
                if usage is None and not text and self._is_the_apps_own():
                    text = _own_text(answer, head, tail)  # it only looks like that format: what there is, counts
        reading = Reading(
            usage,
            # What was lost on the way was written too: then `text` is not all there was.
            ended and (final or not answer.lossy),
            text,
            notes.response_id,
            notes.service_tier,
            notes.error,
            self._broken,
        )
        if self._billed is not None and self._api in _STORED:
            return _metered_once(reading, notes, self._api, self._provider, self._billed)
        return reading

    def _judge_unknown(self, answer: Answer, head: bytes, tail: bytes | None) -> Reading:
        usage = self._filled(None, metrics_in(answer.docs))
        text = None
        if usage is None and self._status < 400:
            text = _own_text(answer, head, tail)
        ended = answer.closed or (answer.endless and self._is_the_apps_own() and not answer.lossy)
        return Reading(usage, ended or usage is not None, text, None, None, None, self._broken)

    def _filled(self, usage: Usage | None, metrics: Doc | None) -> Usage | None:
        """The usage, with what only Bedrock's metrics or headers say."""
        if metrics is not None:
            usage = counted_by_bedrock(usage, metrics, self._request_model)
        if self._headers and self._status < 400:
            usage = counted_by_bedrock(usage, counts_in(self._headers), self._request_model)
        return usage

    def _notes_of(self, dialect: Dialect, docs: Iterable[Doc]) -> Notes:
        notes = Notes(self._provider, self._request_model)
        for doc in docs:
            dialect.note(doc, notes)
        return notes

    def _is_the_apps_own(self) -> bool:
        """Nobody said that this is a provider's answer: then it ends where its bytes do, as far as a meter can tell."""
        return self._api not in DIALECTS

    def _plain_text(self, head: bytes, tail: bytes | None) -> str | None:
        if self._broken is not None or self._status >= 400:
            return None
        content_type = self._content_type or _header(self._headers or {}, "content-type") or ""
        return text_or_none(head + (tail or b""), content_type)


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
    shape of the body. The body may be plain JSON, lines of it, an array, an event stream (also Amazon's), and any of
    them compressed. `headers` are the answer's; Bedrock says its counts there.
    """
    meter = Meter(
        api,
        provider=provider,
        content_type=content_type,
        headers=headers,
        request_model=_model_in(request_body),
    )
    meter.feed(response_body)
    return meter.finish().usage


def _model_in(request_body: bytes) -> str | None:
    asked = parse(request_body) if request_body else None
    if not isinstance(asked, dict):
        return None
    return next((name for field in _MODEL_FIELDS if isinstance(name := asked.get(field), str)), None)


def _dialect_of(api: str | None, answer: Answer) -> Dialect | None:
    """The named format if it fits, else the first that recognises what came."""
    docs = answer.docs
    named = None if api is None else DIALECTS.get(api)
    if named is not None:
        if answer.partial or named is COUNTING:
            return named
        for doc in docs:
            if named.recognises(doc):
                return named
    for doc in docs:
        dialect = recognised(doc)
        if dialect is not None:
            return dialect
    # An error has no shape of its own.
    return named if named is not None and any(doc.get("error") for doc in docs) else None


def _own_text(answer: Answer, head: bytes, tail: bytes | None) -> str | None:
    """What to count of an answer that is no provider's."""
    if answer.own_text is not None:
        return answer.own_text()
    return text_or_none(head if tail is None else head + tail, "")


def _metered_once(
    reading: Reading, notes: Notes, api: str | None, provider: str | None, billed: BilledResponses
) -> Reading:
    """A stored response is metered when it is made, and again only if that could not say its usage.

    So of all that is fetched only what was made in the background counts, once, and only if this process did not
    book its making.
    """
    if reading.response_id is None:
        return reading
    if api not in _RETRIEVES:
        billed.note(provider, reading.response_id)
        return reading
    if reading.usage is None:
        return amended(reading, text=None, free="repeated")
    if notes.background and reading.usage.exact and billed.note(provider, reading.response_id):
        return reading
    return amended(reading, usage=None, text=None, free="repeated")


def _header(headers: Mapping[str, str], name: str) -> str | None:
    value = headers.get(name)
    if value is not None:
        return value
    return next((value for key, value in headers.items() if key.lower() == name), None)


def _ignore(chunk: bytes) -> None:
    """What a meter does with bytes once it has given up or has finished."""


_NOTHING = Kept()

"""How the documents of an answer stand in its bytes: JSON, lines of JSON, server-sent events, AWS frames.

An `Answer` is what a framing gives: the documents that most likely tell everything, and how to come by all of them.
Of a long stream the first and the last few are read; the rest only if those leave the usage open.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Final

import msgspec

from llm_guard_mw.metering import event_stream, sse
from llm_guard_mw.metering.loose_json import Doc, parse, parse_each, parse_strictly, read_cut, read_end

#: So many documents of a stream are read at first: Anthropic's start is there, every format's usage and end mark,
#: and what a gateway may have put around them.
FIRST_DOCS: Final = 3
LAST_DOCS: Final = 4

#: More documents than a megabyte of any provider's stream has; and more that are no JSON than any stream has.
_DOCS_MAX: Final = 20_000
_NONSENSE_MAX: Final = 200
_END_BYTES: Final = 128 * 1024
_BINARY = re.compile(r"(?:image|audio|video|font)/|application/(?:pdf|zip|gzip|x-tar|octet-stream|vnd\.)", re.I)
#: The end of an object and the beginning of the next one, on a line of its own. No single document has that.
_NEXT_LINE = re.compile(rb"\}[ \t]*\r?\n\s*\{")


class Answer(msgspec.Struct, frozen=True):
    """The documents of an answer, and what its framing alone tells about it."""

    docs: list[Doc]
    own_text: Callable[[], str | None] | None = None  # what to count of an unknown format; None: the bytes as they are
    all_docs: Callable[[], Iterator[Doc]] | None = None  # None: `docs` are all
    closed: bool = False  # the framing's own end was seen: the last bracket, or `[DONE]`
    endless: bool = False  # of a framing that has no end mark of its own
    lossy: bool = False  # bytes between the first and the last were not kept
    partial: bool = False  # some of the documents are only the last members of one
    guessed: bool = False  # the usage stood in front of a cut: its level within the document cannot be told

    def every_doc(self) -> Iterator[Doc]:
        return iter(self.docs) if self.all_docs is None else self.all_docs()


def read_answer(head: bytes, tail: bytes | None) -> Answer | None:
    """The answer in these bytes: all of them, or the first and the last. None if they have no framing we know."""
    if head[:1] in (b"{", b"["):
        return _read_json(head, tail)
    if sse.looks_like_events(head):
        return _read_events(head, tail)
    if event_stream.looks_like_frames(head):
        return _read_frames(head, tail)
    return None


def text_or_none(body: bytes, content_type: str) -> str | None:
    """A body as text, if it is one."""
    if (content_type and _BINARY.match(content_type)) or b"\x00" in body[:4096]:
        return None
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        if error.start >= len(body) - 3 or content_type.lower().startswith("text/"):
            return body.decode("utf-8", "replace")  # cut within a character, or another charset
        return None


# ---------------------------------------------------------------- one document, or several in a row


def _read_json(head: bytes, tail: bytes | None) -> Answer:
    whole = parse_strictly(head) if tail is None else None
    if isinstance(whole, dict):  # nearly always
        return Answer([whole], None, None, True)
    if whole is None and head.startswith(b"{") and _NEXT_LINE.search(head):
        return _read_lines(head, tail)
    if whole is None and tail is None:
        whole = parse(head)
    if isinstance(whole, dict):
        return Answer([whole], closed=True)
    if isinstance(whole, list):
        return _of_many([doc for doc in whole if isinstance(doc, dict)])
    # Too large, cut off, several values in a row, or not quite JSON: what can be read of it?
    docs, closed = parse_each(head) if tail is None else ([], False)
    if closed:
        return _of_many(docs)
    end = (head if tail is None else tail)[-_END_BYTES:]
    last = read_end(end)
    if last is not None:
        return Answer([*docs, last], closed=True, lossy=tail is not None, partial=True)
    if not docs and not end.rstrip().endswith((b"}", b"]")):
        last = read_cut(end)
        if last is not None:
            return Answer([last], lossy=tail is not None, partial=True, guessed=True)
    return Answer(docs, lossy=tail is not None)


def _of_many(docs: list[Doc]) -> Answer:
    """A whole array, or documents in a row: read like a stream, whose documents they are."""
    if len(docs) <= FIRST_DOCS + LAST_DOCS:
        return Answer(docs, closed=True)
    return Answer([*docs[:FIRST_DOCS], *docs[-LAST_DOCS:]], all_docs=lambda: islice(docs, _DOCS_MAX), closed=True)


def _read_lines(head: bytes, tail: bytes | None) -> Answer:
    """A document a line."""
    if tail is None and head.count(b"\n") < FIRST_DOCS + LAST_DOCS:
        return Answer(list(_documents(head.split(b"\n"))), endless=True)
    pieces = [head] if tail is None else [head, tail]
    # The first line of the tail has lost its start. If it was a large one, it may be the one that counts.
    cut = None if tail is None else read_end(tail.partition(b"\n")[0])
    between = [] if cut is None else [cut]
    first = head.split(b"\n", FIRST_DOCS)[:FIRST_DOCS]
    last = pieces[-1].rstrip().rsplit(b"\n", LAST_DOCS)[1:]
    return Answer(
        [*_documents(first), *between, *_documents(last)],
        all_docs=lambda: chain(between, *(_documents(piece.split(b"\n")) for piece in pieces)),
        endless=True,
        lossy=tail is not None,
        partial=cut is not None,
    )


# ---------------------------------------------------------------- server-sent events


def _read_events(head: bytes, tail: bytes | None) -> Answer:
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

    return Answer(
        [*_documents(first), *between, *_documents(last)],
        own_text=lambda: _join_text(_data_of(*pieces)),
        all_docs=all_docs if more or tail is not None else None,
        endless=True,
        partial=cut is not None,
        closed=any(_is_done(data) for data in first + last),
        lossy=tail is not None,
    )


def _is_done(data: bytes) -> bool:
    return data[-16:].rpartition(b"\n")[2].strip() == b"[DONE]"


def _opening(data: bytes) -> tuple[list[bytes], int]:
    """What the first events say, and the position behind them."""
    found = list(islice(sse.forward(data), FIRST_DOCS))
    return [said for said, _ in found], found[-1][1] if found else len(data)


def _closing(data: bytes, start: int) -> tuple[list[bytes], bool]:
    """What the last events behind `start` say, in order, and whether there are more before them."""
    found = list(islice(sse.backward(data, start), LAST_DOCS))
    return [said for said, _ in reversed(found) if said], bool(found) and found[-1][1] > start


def _data_of(*pieces: bytes) -> Iterator[bytes]:
    return (said for piece in pieces for said, _ in sse.forward(piece))


def _documents(events: Iterable[bytes]) -> Iterator[Doc]:
    """The objects in what events or lines say. Some servers leave out the empty lines: then each line is one."""
    return islice(_objects(events, _NONSENSE_MAX), _DOCS_MAX)


def _objects(events: Iterable[bytes], nonsense_left: int) -> Iterator[Doc]:
    for data in events:
        if b"{" not in data:
            continue
        doc = parse(data)
        if isinstance(doc, dict):
            yield doc
        elif isinstance(doc, list):
            yield from (item for item in doc if isinstance(item, dict))
        elif doc is None and b"\n" in data:
            yield from _objects(data.split(b"\n"), nonsense_left)
        else:
            nonsense_left -= 1
            if nonsense_left < 0:
                return


def _join_text(data: Iterable[bytes]) -> str:
    return "".join(said.removesuffix(b"[DONE]").decode("utf-8", "replace") for said in data)


# ---------------------------------------------------------------- AWS frames


def _read_frames(head: bytes, tail: bytes | None) -> Answer:
    spans, whole = event_stream.spans(head)
    pieces = [(head, spans)]
    if tail is not None:
        spans, whole = event_stream.spans(tail)
        pieces.append((tail, spans))
    end, spans = pieces[-1]
    first = pieces[0][1][:FIRST_DOCS]
    last = spans[max(len(first) if tail is None else 0, len(spans) - LAST_DOCS) :]
    few = tail is None and len(first) + len(last) == len(spans)

    def all_docs() -> Iterator[Doc]:
        return islice((doc for data, frames in pieces for doc in event_stream.documents(data, frames)), _DOCS_MAX)

    return Answer(
        [*event_stream.documents(head, first), *event_stream.documents(end, last)],
        own_text=lambda: None,
        all_docs=None if few else all_docs,
        endless=whole,
        lossy=tail is not None,
    )

"""What stands in a spool, byte by byte: frames that can be told from damage, and the records in them.

    frame    FF 00 · length of the body (4 bytes) · sequence (8) · CRC-32 of these two and the body (4) · body
    body     a record as JSON; numbers in a frame are little-endian

Rule 1. A frame is right or it is not: whatever a crash or a disk does to one is seen.
Rule 2. A frame that is not right costs itself alone. The next right one is found by its first two bytes, which no
        JSON contains, and its sequence says how many are missing.
Rule 3. A record holds what the account needs: no prompt, no answer, no key.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import msgspec
from msgspec.structs import replace

from llm_guard_mw.model import Basis, EntryKind, Kind, Line, Unit
from llm_guard_mw.stores.journal import encode_event, read_event
from llm_guard_mw.stores.protocol import Granted, Moved, Replay, Reserve, Settlement

VERSION = 1
#: No record is longer; a length beyond it is damage.
BODY_BYTES_MAX = 1 << 20

_MAGIC = b"\xff\x00"
_HEAD = struct.Struct("<2sIQI")
_COUNTED = struct.Struct("<IQ")


# ---------------------------------------------------------------- frames


@dataclass(frozen=True, slots=True)
class Frame:
    """One record, as it stands between `start` and `end`."""

    sequence: int
    body: bytes
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes that are no frame. `torn`: the last ones, and what a write leaves that was cut short."""

    start: int
    end: int
    torn: bool


class Bytes(Protocol):
    """What bytes and a mapped file have in common."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> bytes: ...

    def find(self, what: bytes, start: int, /) -> int: ...


def frame(sequence: int, body: bytes) -> bytes:
    """A record on its way into the file."""
    check = zlib.crc32(body, zlib.crc32(_COUNTED.pack(len(body), sequence)))
    return _HEAD.pack(_MAGIC, len(body), sequence, check) + body


def frames(data: Bytes, at: int = 0) -> Iterator[Frame | Damage]:
    """All that stands in `data` from `at` on, in order: nothing is left out without a word."""
    while at < len(data):
        found = _frame_at(data, at) or _damage_at(data, at)
        yield found
        at = found.end


def _frame_at(data: Bytes, at: int) -> Frame | None:
    head = data[at : at + _HEAD.size]
    if len(head) < _HEAD.size:
        return None
    magic, length, sequence, check = _HEAD.unpack(head)
    end = at + _HEAD.size + length
    if magic != _MAGIC or length > BODY_BYTES_MAX or end > len(data):
        return None
    body = data[at + _HEAD.size : end]
    right = zlib.crc32(body, zlib.crc32(_COUNTED.pack(length, sequence))) == check
    return Frame(sequence, body, at, end) if right else None


def _damage_at(data: Bytes, at: int) -> Damage:
    following = _next_frame(data, at + 1)
    return Damage(at, following, torn=following == len(data) and _is_begun(data, at))


def _next_frame(data: Bytes, at: int) -> int:
    """Where the next right frame begins; the end of the data if there is none."""
    while (at := data.find(_MAGIC, at)) >= 0:
        if _frame_at(data, at) is not None:
            return at
        at += 1
    return len(data)


def _is_begun(data: Bytes, at: int) -> bool:
    """Whether the bytes from `at` on are the beginning of a frame, and no more."""
    head = data[at : at + _HEAD.size]
    if len(head) < _HEAD.size:
        return _MAGIC.startswith(head[:2])
    magic, length, _, _ = _HEAD.unpack(head)
    return bool(magic == _MAGIC and length <= BODY_BYTES_MAX and at + _HEAD.size + length > len(data))


# ---------------------------------------------------------------- records


#: balance, kind, unit, window start, held, spent at once, actual, and when (ms) it has drained: 0 is never.
MovedValues = tuple[str, Kind, Unit, int, int, bool, int, int]


class Header(msgspec.Struct, frozen=True, tag="spool"):
    """The first record (sequence 0): which spool, for which store."""

    version: int
    source: str
    store: str


class Begun(msgspec.Struct, frozen=True, tag="begun"):
    """An exchange was granted alone; if nothing more is heard of it, this is booked."""

    exchange: str
    call: str
    takes: str | None  # the exchange in whose place it stands, of which nothing is booked then
    at: int  # ms
    offer: int
    cap: int
    moved: tuple[MovedValues, ...]
    draft: msgspec.Raw


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """An exchange has ended: its settlement."""

    exchange: str
    call: str
    kind: EntryKind
    lease_end: int
    fresh: bool
    moved: tuple[MovedValues, ...]
    event: msgspec.Raw


class Dropped(msgspec.Struct, frozen=True, tag="dropped"):
    """Another exchange, which the store has granted, stands in the place of this one."""

    exchange: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """A call was refused: an entry that moves nothing."""

    id: str
    event: msgspec.Raw


Record = Header | Begun | Ended | Dropped | Refused

_encode = msgspec.json.Encoder().encode
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


raw = msgspec.Raw


def encode(record: Record) -> bytes:
    return _encode(record)


def decode(body: bytes) -> Record:
    """The record of a frame. Raises msgspec.MsgspecError for what another version wrote."""
    return _decoder.decode(body)


def begun(wish: Reserve, granted: Granted, drained: Drained) -> Begun:
    moved = tuple(_values(Moved(replace(line, amount=0), line.amount), drained) for line in granted.lines)
    takes = wish.takes if granted.took else None
    draft = msgspec.Raw(wish.draft)
    return Begun(wish.exchange, wish.call, takes, granted.at, granted.offer, granted.cap, moved, draft)


def ended(settlement: Settlement, drained: Drained) -> Ended:
    moved = tuple(_values(each, drained) for each in settlement.moved)
    return Ended(
        settlement.exchange,
        settlement.call,
        settlement.kind,
        settlement.lease_end,
        settlement.fresh,
        moved,
        msgspec.Raw(settlement.payload),
    )


class Drained(Protocol):
    """When a bucket will have forgotten what a line puts into it now, ms; 0 for what does not drain."""

    def __call__(self, line: Line, /) -> int: ...


def _values(moved: Moved, drained: Drained) -> MovedValues:
    line = moved.line
    return (
        line.balance,
        line.kind,
        line.unit,
        line.window_start,
        line.amount,
        line.spent,
        moved.actual,
        drained(line),
    )


# ---------------------------------------------------------------- what a record becomes


def settlement_of(record: Ended, replay: Replay, now: int) -> Settlement:
    """What is settled at `now`. What a bucket has let go meanwhile is not put into it again."""
    return Settlement(
        record.exchange,
        record.call,
        record.kind,
        record.lease_end,
        _moved(record.moved, now),
        bytes(record.event),
        record.fresh,
        replay,
    )


def settlement_of_abandoned(record: Begun, replay: Replay, now: int) -> Settlement:
    """The process died in the middle of it: the hold is booked, as of when it was made."""
    event = read_event(EntryKind.ABANDONED, record.at, bytes(record.draft), offer=record.offer, cap=record.cap)
    payload = encode_event(replace(event, kind=EntryKind.SETTLE, basis=Basis.ABANDONED))
    moved = _moved(record.moved, now)
    return Settlement(
        record.exchange, record.call, EntryKind.SETTLE, record.at, moved, payload, fresh=True, replay=replay
    )


def _moved(values: Iterable[MovedValues], now: int) -> tuple[Moved, ...]:
    return tuple(
        Moved(Line(balance, kind, unit, window_start, held, spent), actual)
        for balance, kind, unit, window_start, held, spent, actual, drained in values
        if not drained or now < drained
    )

"""The verbs of the protocol as conversations with Redis: generators that say commands and are sent the replies.

Nothing here does I/O, so that the sync and the async face of `redis.py` share every word. A conversation is given
its replies in the order of its commands, with no error among them: one that got an error is ended there.

Rule 1. Whatever changes something is one script, and may be sent twice: it is idempotent by exchange id.
Rule 2. Scripts are told all their keys. What only Redis knows (which holds are due, what a lost grant held) is read
        first, and looked at again by the script that acts on it.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from llm_guard_mw.errors import StoreUnavailable
from llm_guard_mw.model import EntryKind, JournalEntry, Kind, Line, Offer, Unit, Window
from llm_guard_mw.stores.journal import read_event
from llm_guard_mw.stores.protocol import (
    BalanceState,
    ClockApart,
    Granted,
    HoldState,
    Moved,
    Refused,
    Renewed,
    Reserve,
    Settled,
    Settlement,
    Standing,
    TooLate,
    Unreadable,
)
from llm_guard_mw.stores.redis_keys import Keys
from llm_guard_mw.stores.redis_scripts import ADMIT, EXPIRE, FORGET, RENEW, RESERVE, SETTLE, Script

T = TypeVar("T")
Command = tuple[str | bytes | int, ...]
#: Any: a reply is whatever Redis says.
Talk = Generator[Sequence[Command], Sequence[Any], T]

#: So many holds are booked, leases renewed, subjects looked at in one script: others wait meanwhile.
_BATCH = 100
#: How many subjects one `forget` looks at; the next one goes on behind them.
_FORGET_LOOK = 20_000
#: A measured offset counts if question and answer took no longer than this.
_CLOSE_MS = 50

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode
_KINDS = {"b": Kind.BUCKET, "c": Kind.CALENDAR, "t": Kind.TOTAL}
_SETTLED = {
    1: Settled.DONE,
    2: Settled.AGAIN,
    3: Settled.CORRECTED,
    4: Settled.ORPHAN,
    5: Settled.TOO_LATE,
}
_LINES = 4
_ENDING = re.compile(rb"-(\w+) (\d+)")


def wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


class Steps:
    """The conversations of one store. `clock` is for tests: the scripts then go by it, and not by Redis' own."""

    def __init__(self, keys: Keys, clock: Callable[[], int] | None, journal_max: int) -> None:
        self.keys = keys
        self.injected = clock
        self.room = journal_max * 9 // 10
        self.offset = 0  # ms that Redis' clock is ahead of ours
        self._forgotten_up_to = ""

    def clock(self) -> int:
        """Redis' clock as far as it is known here, in ms. Costs nothing."""
        return self.injected() if self.injected is not None else wall_clock_ms() + self.offset

    def heard(self, at: int) -> None:
        """A reply that was written at `at`: Redis' clock is not behind that."""
        if self.injected is None:
            self.offset = max(self.offset, at - wall_clock_ms())

    def _now(self) -> str:
        """What a script is told about the time."""
        return "" if self.injected is None else str(self.injected())

    # ------------------------------------------------------------ reserve

    def reserve(self, wish: Reserve) -> Talk[Granted | Refused | ClockApart | TooLate]:
        swept = False
        taken_names: list[str] = []
        while True:
            (reply,) = yield [self._reserve(wish, taken_names)]
            word, at, *rest = _decode(reply)
            self.heard(at)
            if word in ("granted", "again"):
                return _granted(wish, at, word == "again", *rest)
            if word == "refused":
                due, standings, short = rest
                if due and not swept:
                    swept = True
                    yield from self._expire(at, 10 * _BATCH)
                    continue
                read = zip(wish.offers, standings, strict=True)
                return Refused(
                    tuple(_standings(offer, each) for offer, each in read), tuple(tuple(each) for each in short), at
                )
            if word == "keys":
                (taken_names,) = rest
                continue
            if word == "full":
                raise StoreUnavailable("the journal is nearly full: is the ledger reachable?")
            return ClockApart(at) if word == "apart" else TooLate(at)

    def _reserve(self, wish: Reserve, taken_names: Iterable[str]) -> Command:
        keys = self.keys
        exchange = keys.exchange(wish.exchange)
        taken = exchange if wish.takes is None else keys.exchange(wish.takes)
        said = _Message(keys, exchange, taken, keys.due, keys.journal, keys.subjects, keys.places, keys.call(wish.call))
        offers: list[Any] = [len(wish.offers)]
        for offer in wish.offers:
            offers += (offer.cap, offer.at_least, len(offer.demands))
            for demand in offer.demands:
                offers += (
                    said.balance(demand.balance, demand.kind),
                    demand.unit,
                    demand.ceiling,
                    demand.fixed,
                    demand.per_output,
                    demand.unit is Unit.REQUESTS,  # spent_at_reserve
                )
                if demand.kind is Kind.CALENDAR:
                    offers += _edges(demand.windows)
                else:
                    offers += (demand.rate, demand.period, demand.tick, 0)
        for name in taken_names:  # of other kinds than those here: they move only what they hold
            said.balance(name, _kind_of(name))
        packed = _encode(
            [
                wish.exchange,
                wish.call,
                wish.lease_ms,
                -1 if wish.not_after is None else wish.not_after,
                wish.force,
                wish.takes or "",
                self.room,
                said.count,
                *said.balances,
                *offers,
            ]
        )
        return said.script(RESERVE, self._now(), packed, wish.draft)

    # ------------------------------------------------------------ settle

    def settle(self, settlement: Settlement) -> Talk[Settled]:
        moved, learnt = settlement.moved, False
        if settlement.kind is EntryKind.RELEASE and not moved:
            (kept,) = yield [("GET", self.keys.exchange(settlement.exchange))]
            if kept is None or not kept.startswith(b"+"):
                return Settled.AGAIN
            learnt = True
            moved = tuple(Moved(line, line.amount if line.spent else 0) for line in _lines(_hold(kept)[_LINES:]))
        (outcome,) = yield [self._settle(settlement, moved, learnt)]
        return _SETTLED[outcome]

    def _settle(self, settlement: Settlement, moved: Sequence[Moved], learnt: bool) -> Command:
        keys = self.keys
        said = _Message(keys, keys.exchange(settlement.exchange), keys.due, keys.journal, keys.subjects)
        moves: list[Any] = [len(moved)]
        for each in moved:
            line = each.line
            moves += (
                said.balance(line.balance, line.kind),
                line.unit,
                line.window_start,
                line.amount,
                line.spent,
                each.actual,
            )
        packed = _encode(
            [
                settlement.exchange,
                settlement.kind,
                settlement.lease_end,
                settlement.fresh,
                learnt,
                "",
                said.count,
                *said.balances,
                *moves,
            ]
        )
        return said.script(SETTLE, self._now(), packed, settlement.payload)

    def append(self, entry_id: str, payload: bytes) -> Talk[None]:
        keys = self.keys
        said = _Message(keys, keys.refusal(entry_id), keys.due, keys.journal, keys.subjects)
        packed = _encode(("", EntryKind.REFUSED, 0, True, False, entry_id, 0, 0))
        yield [said.script(SETTLE, self._now(), packed, payload)]

    # ------------------------------------------------------------ leases, calls, scope values

    def renew(self, exchanges: Sequence[str], calls: Sequence[str], lease_ms: int) -> Talk[Renewed]:
        lease_end, gone = 0, []
        for start in range(0, max(len(exchanges), len(calls), 1), _BATCH):
            some_calls = calls[start : start + _BATCH]
            places = (yield [("SMEMBERS", self.keys.call(call)) for call in some_calls]) if some_calls else ()
            said = _Message(self.keys, self.keys.due, self.keys.places)
            renewed = [
                (
                    call,
                    said.key(self.keys.call(call)),
                    [(said.key(self.keys.members(name)), name) for name in map(bytes.decode, names)],
                )
                for call, names in zip(some_calls, places, strict=True)
                if names
            ]
            packed = _encode((exchanges[start : start + _BATCH], renewed))
            (reply,) = yield [said.script(RENEW, self._now(), lease_ms, packed)]
            end, some_gone = _decode(reply)
            lease_end = lease_end or end  # the earliest
            gone += some_gone
        return Renewed(lease_end, tuple(gone))

    def close_call(self, call: str) -> Talk[None]:
        (places,) = yield [("SMEMBERS", self.keys.call(call))]
        if places:
            leave = [("ZREM", self.keys.members(name.decode()), call) for name in places]
            yield [*leave, ("SREM", self.keys.call(call), *places)]

    def admit(self, parent: str, scope: str, value: str, day: int, most: int) -> Talk[bool]:
        said = _Message(self.keys, self.keys.values(parent, scope))
        (reply,) = yield [said.script(ADMIT, value, day, most)]
        return bool(reply)

    # ------------------------------------------------------------ expiry

    def expire(self, most: int) -> Talk[int]:
        now = yield from self.now()
        return (yield from self._expire(now, most))

    def _expire(self, now: int, most: int) -> Talk[int]:
        """Read what is due, then book it; the script looks again. Places that nobody renews are freed on the way."""
        total = 0
        while True:
            due_range = ("ZRANGEBYSCORE", self.keys.due, "-inf", now, "LIMIT", 0, min(_BATCH, most - total))
            places_range = ("ZRANGEBYSCORE", self.keys.places, "-inf", now, "LIMIT", 0, _BATCH)
            due, places = yield [due_range, places_range]
            if not due and not places:
                break
            names = [name.decode() for name in due]
            kept = (yield [("GET", self.keys.exchange(name)) for name in names]) if names else ()
            ((booked, skipped),) = yield [self._expiry(names, kept, [name.decode() for name in places])]
            total += booked
            if max(len(due), len(places)) < _BATCH or skipped == len(due) > 0 or total >= most:
                break
        if self.injected is not None:
            yield from self._lapse(now)
        return total

    def _expiry(self, names: Sequence[str], kept: Sequence[bytes | None], places: Sequence[str]) -> Command:
        said = _Message(self.keys, self.keys.due, self.keys.journal, self.keys.subjects, self.keys.places)
        exchanges = [(said.key(self.keys.exchange(name)), name) for name in names]
        for each in kept:
            if each is not None and each.startswith(b"+"):
                for line in _lines(_hold(each)[_LINES:]):
                    said.balance(line.balance, line.kind)
        members = [(said.key(self.keys.members(name)), name) for name in places]
        return said.script(EXPIRE, self._now(), _encode((exchanges, members, said.count, *said.balances)))

    def _lapse(self, now: int) -> Talk[None]:
        """End the endings that have had their time. Redis does so by its TTLs; a clock of the test's own needs this."""
        cursor = b"0"
        while True:
            ((cursor, names),) = yield [("SCAN", cursor, "MATCH", self.keys.exchange("*"), "COUNT", 1000)]
            if names:
                kept = yield [("GETRANGE", name, 0, 63) for name in names]
                matches = ((name, _ENDING.match(each)) for name, each in zip(names, kept, strict=True))
                gone = [name for name, ending in matches if ending is not None and int(ending[2]) < now]
                if gone:
                    yield [("DEL", *gone)]
            if cursor == b"0":
                return

    def forget(self, most: int) -> Talk[int]:
        total = looked = 0
        while total < most and looked < _FORGET_LOOK:
            low = f"({self._forgotten_up_to}" if self._forgotten_up_to else "-"
            page = yield from self._subjects(low, _BATCH)
            if page:
                said = _Message(self.keys, self.keys.subjects, *(name.removesuffix("|") for name in page))
                (dropped,) = yield [said.script(FORGET, self._now(), most - total)]
                total += dropped
                looked += len(page)
            whole = len(page) == _BATCH
            self._forgotten_up_to = page[-1] if whole and total < most else ""
            if not whole:
                break
        return total

    # ------------------------------------------------------------ reading

    def peek(self, balances: Sequence[str]) -> Talk[Sequence[BalanceState]]:
        if not balances:
            return ()
        places = [self.keys.place_of(name, Kind.TOTAL) for name in balances]
        kept = yield [("HGET", key, field) for key, field in places]
        return tuple(_state(name, each) for name, each in zip(balances, kept, strict=True) if each is not None)

    def balances(self, after: str, count: int) -> Talk[Sequence[BalanceState]]:
        states: list[BalanceState] = []
        low = f"[{self.keys.place_of(after, Kind.TOTAL)[0]}|" if after else "-"
        while len(states) < count:
            page = yield from self._subjects(low, count)
            if not page:
                break
            hashes = yield [("HGETALL", name.removesuffix("|")) for name in page]
            for key, fields in zip(page, hashes, strict=True):
                for field, kept in zip(fields[::2], fields[1::2], strict=True):
                    name = self.keys.balance_name(key.removesuffix("|"), field.decode())
                    if field != b"ttl" and name > after:
                        states.append(_state(name, kept))
            low = f"({page[-1]}"
            if len(page) < count:
                break
        return tuple(sorted(states, key=lambda state: state.balance)[:count])

    def _subjects(self, low: str, count: int) -> Talk[Sequence[str]]:
        """A page of the index: a subject's key and a bar, so that they stand in the order of the balances' names."""
        (page,) = yield [("ZRANGEBYLEX", self.keys.subjects, low, "+", "LIMIT", 0, count)]
        return [name.decode() for name in page]

    def holds(self, after: str, count: int) -> Talk[Sequence[HoldState]]:
        (due,) = yield [("ZRANGE", self.keys.due, 0, -1, "WITHSCORES")]
        ends = {name.decode(): int(score) for name, score in zip(due[::2], due[1::2], strict=True)}
        page = sorted(name for name in ends if name > after)[:count]
        if not page:
            return ()
        kept = yield [("GET", self.keys.exchange(name)) for name in page]
        return tuple(
            HoldState(name, hold[0], ends[name], _lines(hold[_LINES:]))
            for name, hold in ((name, _hold(each)) for name, each in zip(page, kept, strict=True) if _is_hold(each))
        )

    def now(self) -> Talk[int]:
        if self.injected is not None:
            return self.injected()
        asked = wall_clock_ms()
        ((seconds, micros),) = yield [("TIME",)]
        return self.told_time(asked, int(seconds), int(micros))

    def told_time(self, asked: int, seconds: int, micros: int) -> int:
        """Redis' time, answered just now to a question of `asked`: corrects what is thought of its clock."""
        at, answered = seconds * 1000 + micros // 1000, wall_clock_ms()
        if 0 <= answered - asked <= _CLOSE_MS:
            self.offset = at - (asked + answered) // 2
        return at

    # ------------------------------------------------------------ the journal

    def read_journal(self, after: str, count: int) -> Talk[Sequence[JournalEntry | Unreadable]]:
        low = f"({_stream_id(after)}" if after else "-"
        (entries,) = yield [("XRANGE", self.keys.journal, low, "+", "COUNT", count)]
        return tuple(
            _entry(entry_id, dict(zip(values[::2], values[1::2], strict=True))) for entry_id, values in entries
        )

    def trim_journal(self, upto: str) -> Talk[None]:
        if upto:
            ms, _, number = _stream_id(upto).partition("-")
            yield [("XTRIM", self.keys.journal, "MINID", "=", f"{ms}-{int(number) + 1}")]

    def journal_length(self) -> Talk[int]:
        (length,) = yield [("XLEN", self.keys.journal)]
        return int(length)

    def epoch(self) -> Talk[str]:
        *_, value = yield [
            ("HSETNX", self.keys.meta, "epoch", secrets.token_hex(8)),
            ("HGET", self.keys.meta, "epoch"),
        ]
        return str(value.decode())


class _Message:
    """The keys and balances of one script, each named once: in the arguments they are numbers."""

    def __init__(self, keys: Keys, *first: str) -> None:
        self.names = keys
        self.keys = list(first)
        self.balances: list[int | str] = []  # flat: key index, field, name, kind of each
        self.count = 0
        self._known_keys: dict[str, int] = {}
        self._known: dict[str, int] = {}

    def key(self, name: str) -> int:
        """The number of a key in KEYS."""
        number = self._known_keys.get(name)
        if number is None:
            self.keys.append(name)
            number = self._known_keys[name] = len(self.keys)
        return number

    def balance(self, name: str, kind: Kind) -> int:
        """The number of a balance in this message."""
        number = self._known.get(name)
        if number is None:
            key, field = self.names.place_of(name, kind)
            self.balances += (self.key(key), field, name, kind)
            self.count += 1
            number = self._known[name] = self.count
        return number

    def script(self, script: Script, *arguments: str | bytes | int) -> Command:
        return ("EVALSHA", script.sha, len(self.keys), *self.keys, *arguments)


# ---------------------------------------------------------------- what Redis keeps, read


def _granted(
    wish: Reserve,
    at: int,
    again: bool,
    offer: int,
    cap: int,
    lease_end: int,
    took: bool,
    short: Sequence[int],
    lines: Sequence[Any],
    numbers: Sequence[int],
) -> Granted:
    """A grant, from the reply. One that was made before tells all its lines; a new one only those taken over."""
    demands = wish.offers[offer].demands
    standings = _standings(wish.offers[offer], numbers)
    kept = list(_lines(lines))
    if not again:
        kept += [
            Line(
                demand.balance,
                demand.kind,
                demand.unit,
                standing.window_start,
                demand.fixed + demand.per_output * cap,
                demand.spent_at_reserve,
            )
            for demand, standing in zip(demands, standings, strict=True)
            if demand.kind is not Kind.CONCURRENT
        ]
    return Granted(offer, cap, tuple(kept), standings, lease_end, at, tuple(short), took)


def _standings(offer: Offer, numbers: Sequence[int]) -> tuple[Standing, ...]:
    standings = []
    for index, demand in enumerate(offer.demands):
        spent, held, rem, start = numbers[4 * index : 4 * index + 4]
        end = None
        for window in demand.windows:
            if window.start == start:
                end = window.end
        standings.append(Standing(spent, held, rem, start, end))
    return tuple(standings)


def _lines(values: Sequence[Any]) -> tuple[Line, ...]:
    """Lines as the scripts keep them: six values each, flat."""
    return tuple(
        Line(balance, Kind(kind), Unit(unit), window_start, amount, spent)
        for balance, kind, unit, window_start, amount, spent in zip(*[iter(values)] * 6, strict=True)
    )


def _edges(windows: Sequence[Window]) -> tuple[int, int, int, int]:
    """The starts and ends of two windows; one that is not there contains no time."""
    edges = [edge for window in windows[:2] for edge in (window.start, window.end)]
    first, over, second, last = (*edges, 0, 0, 0, 0)[:4]
    return first, over, second, last


def _is_hold(kept: bytes | None) -> bool:
    return kept is not None and kept.startswith(b"+")


def _hold(kept: bytes) -> list[Any]:
    """`[call, offer, cap, took, *lines]` of a hold, as _bucket.lua writes it."""
    length = int.from_bytes(kept[1:5])
    hold: list[Any] = _decode(kept[5 : 5 + length])
    return hold


def _state(name: str, kept: bytes) -> BalanceState:
    kind, start, spent, held, rem, stamp, _rate, _period, tick, changes, _until = _decode(kept)
    return BalanceState(name, _KINDS[kind], start, spent, held, changes, rem, stamp * tick)


def _kind_of(name: str) -> Kind:
    """The kind of a balance that is not concurrent, as its name says it. Only a new balance would need it."""
    said = name.partition("|")[2].partition(":")[0]
    return Kind(said) if said in ("bucket", "calendar", "total") else Kind.TOTAL


def _position(entry_id: bytes) -> str:
    """A stream's id, written so that the order of strings is the order of entries."""
    ms, _, number = entry_id.decode().partition("-")
    return f"{int(ms):015d}-{int(number):015d}"


def _stream_id(position: str) -> str:
    ms, _, number = position.partition("-")
    return f"{int(ms)}-{int(number)}"


def _entry(entry_id: bytes, fields: dict[bytes, bytes]) -> JournalEntry | Unreadable:
    position = _position(entry_id)
    try:
        kind, at = EntryKind(fields[b"kind"].decode()), int(fields[b"at"])
        name = fields[b"id"].decode()
        lines = _lines(_decode(fields[b"lines"]))
    except (msgspec.MsgspecError, LookupError, ValueError, TypeError) as error:  # not written by a script of ours
        reason = f"{type(error).__name__}: {error}"
        at = int(position.partition("-")[0])
        return Unreadable(f"journal/{position}", EntryKind.REFUSED, at, (), repr(fields).encode(), reason, position)
    payload = fields[b"payload"]
    try:
        event = read_event(kind, at, payload, offer=int(fields[b"offer"]), cap=int(fields[b"cap"]))
    except (msgspec.MsgspecError, LookupError, TypeError) as error:  # written by another version, or damaged
        return Unreadable(name, kind, at, lines, payload, f"{type(error).__name__}: {error}", position=position)
    return JournalEntry(name, kind, at, lines, event, position=position)

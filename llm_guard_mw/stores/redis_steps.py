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
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, TypeGuard, TypeVar

import msgspec

from llm_guard_mw.errors import StoreUnavailable
from llm_guard_mw.model import Demand, EntryKind, JournalEntry, Kind, Line, Unit, Window
from llm_guard_mw.stores.journal import read_event
from llm_guard_mw.stores.protocol import (
    BalanceState,
    ClockApart,
    Entries,
    Granted,
    HoldState,
    Moved,
    Refused,
    Renewed,
    Replay,
    Reserve,
    Settled,
    Settlement,
    Standing,
    TooLate,
    Unreadable,
)
from llm_guard_mw.stores.redis_keys import Keys
from llm_guard_mw.stores.redis_scripts import ADMIT, DROP, EXPIRE, FORGET, RENEW, RESERVE, SETTLE, TAKE, Script

T = TypeVar("T")

#: So many holds are booked, leases renewed, subjects looked at in one script: others wait meanwhile.
_BATCH = 100
#: Lua unpacks no more than some thousand values.
_DROPPED_AT_ONCE = 1000
#: The consumers of the journal's stream: what each has in hand, Redis remembers.
_GROUP = "ledger"
#: When the name of a process that drains no more leaves the journal's group.
_CONSUMER_FORGOTTEN_MS = 3_600_000
#: How many subjects one `forget` looks at; the next one goes on behind them.
_FORGET_LOOK = 20_000
#: A measured offset counts if question and answer took no longer than this.
_CLOSE_MS = 50

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode
#: The keys of each message that come before the subjects' hashes.
_RESERVE_KEYS, _SETTLE_KEYS = 7, 4
#: Time, numbers, lines and event.
_OWN_ARGUMENTS = 4
#: Layouts that are remembered, 1.5 kB each: one for reserve and one for settle, of a principal under its limits.
_LAYOUTS_MAX = 8192
#: Of a balance, as KEPT in _bucket.lua has it: all its bytes, and where window start, spent, held, rem, stamp, tick
#: and changes stand.
_KEPT_BYTES, _KEPT_PLACES = 61, ((1, 7), (7, 14), (14, 21), (21, 28), (28, 34), (46, 49), (49, 54))
_CONCURRENT, _REQUESTS = Kind.CONCURRENT, Unit.REQUESTS
_KINDS = {"b": Kind.BUCKET, "c": Kind.CALENDAR, "t": Kind.TOTAL}
_SETTLED = {
    1: Settled.DONE,
    2: Settled.AGAIN,
    3: Settled.CORRECTED,
    4: Settled.ORPHAN,
    5: Settled.TOO_LATE,
}
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
        self._base = keys.base.encode()
        #: By the names of the balances, of which each says its kind and unit.
        self._layouts: dict[Hashable, _Layout] = {}

    def clock(self) -> int:
        """Redis' clock as far as it is known here, in ms. Costs nothing."""
        return self.injected() if self.injected is not None else wall_clock_ms() + self.offset

    def heard(self, at: int) -> None:
        """A reply that was written at `at`: Redis' clock is not behind that."""
        if self.injected is None:
            self.offset = max(self.offset, at - wall_clock_ms())

    def _now(self) -> bytes:
        """What a script is told about the time."""
        return b"" if self.injected is None else b"%d" % self.injected()

    # ------------------------------------------------------------ reserve

    def reserve(self, wish: Reserve) -> Talk[Granted | Refused | ClockApart | TooLate]:
        swept = False
        taken_names: list[str] = []
        while True:
            (reply,) = yield [self._reserve(wish, taken_names)]
            word, at, *rest = _decode(reply)
            self.heard(at)
            if word in ("granted", "again"):
                return _granted(wish, at, rest, all_told=word == "again")
            if word == "refused":
                due, standings, short = rest
                if due and not swept:
                    swept = True
                    yield from self._expire(at, 10 * _BATCH)
                    continue
                read = zip(wish.offers, standings, strict=True)
                return Refused(
                    tuple(_standings(offer.demands, each) for offer, each in read),
                    tuple(tuple(each) for each in short),
                    at,
                )
            if word == "keys":
                (taken_names,) = rest
                continue
            if word == "full":
                raise StoreUnavailable("the journal is nearly full: is the ledger reachable?")
            return ClockApart(at) if word == "apart" else TooLate(at)

    def _reserve(self, wish: Reserve, taken_names: Sequence[str]) -> Spoken:
        takes = wish.takes
        names = (takes is not None, *[tuple([each.balance for each in offer.demands]) for offer in wish.offers])
        if taken_names:
            names += tuple(taken_names)
        layout = self._layouts.get(names)
        if layout is None:
            layout = self._remember(names, self._lay_out_reserve(wish, taken_names))
        said: list[Any] = [
            wish.exchange,
            wish.call,
            wish.lease_ms,
            -1 if wish.not_after is None else wish.not_after,
            wish.force,
            takes or "",
            self.room,
        ]
        for offer in wish.offers:
            said += (offer.cap, offer.at_least)
            for demand in offer.demands:
                if demand.windows:
                    said += (demand.ceiling, demand.fixed, demand.per_output, *_edges(demand.windows))
                else:
                    said += (
                        demand.ceiling,
                        demand.fixed,
                        demand.per_output,
                        demand.rate,
                        demand.period,
                        demand.tick,
                        0,
                    )
        base = self._base
        exchange = b"%bx:%b" % (base, wish.exchange.encode())
        taken = exchange if takes is None else b"%bx:%b" % (base, takes.encode())
        places = b"%bc:%b" % (base, wish.call.encode())
        now, numbers, draft = self._now(), _flat(said), wish.draft
        words = b"%b$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n%b$%d\r\n%b\r\n$%d\r\n%b\r\n%b$%d\r\n%b\r\n" % (
            *(layout.head, len(exchange), exchange, len(taken), taken, len(places), places),
            *(layout.tail, len(now), now, len(numbers), numbers),
            *(layout.lines, len(draft), draft),
        )
        return Spoken(words, RESERVE.sha)

    def _lay_out_reserve(self, wish: Reserve, taken_names: Sequence[str]) -> _Layout:
        keys = self.keys
        demands = [demand for offer in wish.offers for demand in offer.demands]
        kept = (demand.balance for demand in demands if demand.kind is not Kind.CONCURRENT)
        subjects, said, numbers = _by_subject(keys, (*kept, *taken_names), _RESERVE_KEYS)
        counted = dict.fromkeys(demand.balance for demand in demands if demand.kind is Kind.CONCURRENT)
        members = {name: -number for number, name in enumerate(counted, _RESERVE_KEYS + len(subjects) + 1)}
        said.append(len(wish.offers))
        for offer in wish.offers:
            said.append(len(offer.demands))
            for demand in offer.demands:
                name = demand.balance
                if demand.kind is Kind.CONCURRENT:
                    said += (members[name], demand.kind, False, name)
                else:
                    said += (numbers[name], demand.kind, demand.spent_at_reserve, 0)
        lines = [
            [each for d in offer.demands for each in (d.balance, d.kind, d.unit, d.spent_at_reserve)]
            for offer in wish.offers
        ]
        return _Layout.of(
            RESERVE,
            own_keys=3,
            keys=(keys.due, keys.journal, keys.subjects, keys.places, *subjects, *map(keys.members, members)),
            arguments=(_flat(said), _flat(list(numbers)) if wish.takes is not None else b""),
            lines=lines,
        )

    def _remember(self, names: Hashable, layout: _Layout) -> _Layout:
        while len(self._layouts) >= _LAYOUTS_MAX:
            self._layouts.pop(next(iter(self._layouts), None), None)
        self._layouts[names] = layout
        return layout

    # ------------------------------------------------------------ settle

    def settle(self, settlement: Settlement) -> Talk[Settled]:
        moved, learnt = settlement.moved, False
        if settlement.kind is EntryKind.RELEASE and not moved and not settlement.fresh:
            (kept,) = yield [("GET", self.keys.exchange(settlement.exchange))]
            if not _is_hold(kept):
                return Settled.AGAIN
            learnt = True
            moved = tuple(Moved(line, line.amount if line.spent else 0) for line in _hold(kept).lines)
        (outcome,) = yield [self._settle(settlement, moved, learnt)]
        return _SETTLED[outcome]

    def _settle(self, settlement: Settlement, moved: Sequence[Moved], learnt: bool) -> Command | Spoken:
        lines = [each.line for each in moved]
        said = [settlement.exchange, settlement.kind, settlement.lease_end, settlement.fresh, learnt, ""]
        for each in moved:
            line = each.line
            said += (line.window_start, line.amount, each.actual)
        exchange = b"%bx:%b" % (self._base, settlement.exchange.encode())
        if settlement.replay is not None:
            return self._replay(exchange, lines, said, settlement.payload, settlement.replay)
        return self._close(exchange, lines, said, settlement.payload)

    def _close(self, exchange: bytes, lines: Sequence[Line], said: list[Any], payload: bytes) -> Spoken:
        known_by = tuple([each for line in lines for each in (line.balance, line.spent)])
        layout = self._layouts.get(known_by)
        if layout is None:
            layout = self._remember(known_by, self._lay_out_settle(lines))
        now, numbers = self._now(), _flat(said)
        words = b"%b$%d\r\n%b\r\n%b$%d\r\n%b\r\n$%d\r\n%b\r\n%b$%d\r\n%b\r\n" % (
            *(layout.head, len(exchange), exchange),
            *(layout.tail, len(now), now, len(numbers), numbers),
            *(layout.lines, len(payload), payload),
        )
        return Spoken(words, SETTLE.sha)

    def _lay_out_settle(self, lines: Sequence[Line]) -> _Layout:
        keys, layout = self._settled_places(lines)
        return _Layout.of(SETTLE, own_keys=1, keys=keys, arguments=(layout,), lines=_said_of(lines))

    def _settled_places(self, lines: Sequence[Line]) -> tuple[Sequence[str], bytes]:
        """The keys of a settlement behind that of its exchange, and where in them the script finds its balances."""
        keys = self.keys
        subjects, said, numbers = _by_subject(keys, (line.balance for line in lines), _SETTLE_KEYS)
        said.append(len(lines))
        for line in lines:
            said += (numbers[line.balance], line.kind, line.spent)
        return (keys.due, keys.journal, keys.subjects, *subjects), _flat(said)

    def _replay(
        self, exchange: bytes, lines: Sequence[Line], said: list[Any], payload: bytes, replay: Replay
    ) -> Command:
        """The same words and a mark behind them. They are said once in a while, so nothing of them is remembered."""
        keys, layout = self._settled_places(lines)
        numbers, of_lines = _flat(said), _encode(_said_of(lines))
        said_of_it: Command = layout, self._now(), numbers, of_lines, payload, replay.source, replay.position
        return ("EVALSHA", SETTLE.sha, len(keys) + 2, exchange, *keys, self.keys.replayed, *said_of_it)

    def append(self, entry_id: str, payload: bytes) -> Talk[None]:
        refusal = self.keys.refusal(entry_id).encode()
        yield [self._close(refusal, (), ["", EntryKind.REFUSED, 0, True, False, entry_id], payload)]

    def replayed(self, source: str) -> Talk[int]:
        (position,) = yield [("HGET", self.keys.replayed, source)]
        return int(position or 0)

    def end_replay(self, source: str) -> Talk[None]:
        yield [("HDEL", self.keys.replayed, source)]

    # ------------------------------------------------------------ leases, calls, scope values

    def renew(self, exchanges: Sequence[str], calls: Sequence[str], lease_ms: int) -> Talk[Renewed]:
        lease_end, gone = 0, []
        for start in range(0, max(len(exchanges), len(calls), 1), _BATCH):
            some_calls = calls[start : start + _BATCH]
            places = (yield [("SMEMBERS", self.keys.call(call)) for call in some_calls]) if some_calls else ()
            said = _Message(self.keys.due, self.keys.places)
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
        said = _Message(self.keys.values(parent, scope))
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
        balances = (line.balance for each in kept if _is_hold(each) for line in _hold(each).lines)
        first = (self.keys.due, self.keys.journal, self.keys.subjects, self.keys.places)
        subjects, layout, numbers = _by_subject(self.keys, balances, len(first))
        said = _Message(*first, *subjects)
        exchanges = [(said.key(self.keys.exchange(name)), name) for name in names]
        members = [(said.key(self.keys.members(name)), name) for name in places]
        return said.script(EXPIRE, self._now(), _encode((exchanges, members, list(numbers), layout)))

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
                said = _Message(self.keys.subjects, *(name.removesuffix("|") for name in page))
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
            HoldState(name, hold.call, ends[name], hold.lines)
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

    def take_journal(self, consumer: str, count: int, idle_ms: int) -> Talk[Entries]:
        journal = self.keys.journal
        taking = _Message(journal).script(TAKE, _GROUP, consumer, count, idle_ms, _CONSUMER_FORGOTTEN_MS)
        while True:
            (where,) = yield [taking]
            if not where:
                return ()
            reading = ("XREADGROUP", "GROUP", _GROUP, consumer, "COUNT", count, "STREAMS", journal, where)
            (reply,) = yield [reading]
            entries = reply[0][1] if reply else ()
            gone = [entry_id for entry_id, fields in entries if fields is None]  # somebody took it out of the stream
            if not gone:
                return _entries(entries)
            yield [("XACK", journal, _GROUP, *gone)]

    def drop_journal(self, positions: Sequence[str]) -> Talk[None]:
        for start in range(0, len(positions), _DROPPED_AT_ONCE):
            ids = [_stream_id(position) for position in positions[start : start + _DROPPED_AT_ONCE]]
            yield [_Message(self.keys.journal).script(DROP, _GROUP, *ids)]

    def read_journal(self, after: str, count: int) -> Talk[Entries]:
        low = f"({_stream_id(after)}" if after else "-"
        (entries,) = yield [("XRANGE", self.keys.journal, low, "+", "COUNT", count)]
        return _entries(entries)

    def attend(self, for_ms: int) -> Talk[None]:
        key = self.keys.worker
        yield [("SET", key, self.clock() + for_ms, "PX", for_ms) if for_ms > 0 else ("DEL", key)]

    def attended(self) -> Talk[bool]:
        (until,) = yield [("GET", self.keys.worker)]
        return until is not None and self.clock() < int(until)

    def journal_length(self) -> Talk[int]:
        (length,) = yield [("XLEN", self.keys.journal)]
        return int(length)

    def epoch(self) -> Talk[str]:
        *_, value = yield [
            ("HSETNX", self.keys.meta, "epoch", secrets.token_hex(8)),
            ("HGET", self.keys.meta, "epoch"),
        ]
        return str(value.decode())


# ---------------------------------------------------------------- what is said


class Spoken(NamedTuple):
    """A script with its keys and arguments, as Redis reads it."""

    words: bytes
    sha: str


Command = Spoken | tuple[str | bytes | int, ...]
#: Any: a reply is whatever Redis says.
Talk = Generator[Sequence[Command], Sequence[Any], T]


class _Layout(NamedTuple):
    """What all messages about the same balances have in common, as Redis reads it: most of their words.

    Between `head` and `tail` come the keys of the exchange; behind `tail` the time and the numbers; behind `lines`,
    which are what hold and journal say of the lines besides numbers, comes what the event says.
    """

    head: bytes
    tail: bytes
    lines: bytes

    @classmethod
    def of(
        cls,
        script: Script,
        *,
        own_keys: int,
        keys: Sequence[str],
        arguments: Sequence[bytes],
        lines: Sequence[Any],  # of strings and booleans, in lists or not
    ) -> _Layout:
        keys_in_all = own_keys + len(keys)
        words = 3 + keys_in_all + len(arguments) + _OWN_ARGUMENTS
        head = b"*%d\r\n" % words + _bulks(b"EVALSHA", script.sha.encode(), b"%d" % keys_in_all)
        return cls(head, _bulks(*map(str.encode, keys), *arguments), _bulks(_encode(lines)))


def _said_of(lines: Sequence[Line]) -> list[Any]:
    """What hold and journal keep of lines besides their numbers."""
    return [each for line in lines for each in (line.balance, line.kind, line.unit, line.spent)]


def _bulks(*words: bytes) -> bytes:
    return b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words])


def _flat(values: list[Any]) -> bytes:
    """The values in msgpack, one behind the other: an array without its head."""
    packed = _encode(values)
    return packed[1 if len(values) < 16 else 3 if len(values) < 65_536 else 5 :]


def _unflat(packed: bytes, count: int) -> list[Any]:
    values: list[Any] = _decode(b"\xdd" + count.to_bytes(4) + packed)
    return values


def _by_subject(keys: Keys, names: Iterable[str], keys_before: int) -> tuple[list[str], list[Any], dict[str, int]]:
    """The hashes of some balances, what the layout says of them, and the balances' numbers."""
    subjects: dict[str, list[tuple[str, str]]] = {}
    for name in dict.fromkeys(names):
        key, field = keys.place_of(name, Kind.TOTAL)
        subjects.setdefault(key, []).append((field, name))
    said: list[Any] = [len(subjects)]
    numbers: dict[str, int] = {}
    for number, balances in enumerate(subjects.values(), keys_before + 1):
        said += (number, len(balances) + 1, "ttl", *(field for field, _ in balances))
        for _, name in balances:
            numbers[name] = len(numbers) + 1
    return list(subjects), said, numbers


class _Message:
    """The keys of one script, each named once: in the arguments they are numbers."""

    def __init__(self, *first: str) -> None:
        self.keys = list(first)
        self._known: dict[str, int] = {}

    def key(self, name: str) -> int:
        """The number of a key in KEYS."""
        number = self._known.get(name)
        if number is None:
            self.keys.append(name)
            number = self._known[name] = len(self.keys)
        return number

    def script(self, script: Script, *arguments: str | bytes | int) -> Command:
        return ("EVALSHA", script.sha, len(self.keys), *self.keys, *arguments)


# ---------------------------------------------------------------- what Redis keeps, read


def _granted(wish: Reserve, at: int, told: Sequence[Any], *, all_told: bool) -> Granted:
    """A grant, from the reply. One that was made before tells all its lines; a new one only those taken over."""
    chosen, cap, lease_end, took, short, lines_told, *numbers = told
    demands = wish.offers[chosen].demands
    standings = _standings(demands, numbers)
    lines = list(_lines(lines_told)) if lines_told else []
    if not all_told:
        for demand, standing in zip(demands, standings, strict=True):
            if demand.kind is not _CONCURRENT:
                amount = demand.fixed + demand.per_output * cap
                start, spent = standing.window_start, demand.unit is _REQUESTS
                lines.append(Line(demand.balance, demand.kind, demand.unit, start, amount, spent))
    return Granted(chosen, cap, tuple(lines), standings, lease_end, at, tuple(short or ()), took)


def _standings(demands: Sequence[Demand], numbers: Iterable[int]) -> tuple[Standing, ...]:
    standings = []
    each = iter(numbers)
    for demand, spent, held, rem, start in zip(demands, each, each, each, each, strict=True):
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
    if len(windows) < 2:
        return windows[0].start, windows[0].end, 0, 0
    first, second = windows[:2]
    return first.start, first.end, second.start, second.end


def _is_hold(kept: bytes | None) -> TypeGuard[bytes]:
    return kept is not None and kept.startswith((b"#", b"+"))


class _Hold(NamedTuple):
    call: str
    offer: int
    cap: int
    lines: tuple[Line, ...]
    draft: bytes


def _hold(kept: bytes) -> _Hold:
    """A hold, as _hold.lua has it."""
    if kept.startswith(b"+"):  # an earlier version kept whole lines
        whole, draft = _cut(kept[5:], int.from_bytes(kept[1:5]))
        call, offer, cap, _, *values = _decode(whole)
        return _Hold(call, offer, cap, _lines(values), draft)
    first, second, third = (int.from_bytes(kept[place : place + 4]) for place in (1, 5, 9))
    granted, asked, lines, draft = _cut(kept[13:], first, second, third)
    _, _, offer, cap, _, _, _, taken_over, *numbers = _decode(granted)
    of_offers = _decode(lines)
    wish = _unflat(asked, 7 + sum(2 + 7 * (len(each) // 4) for each in of_offers))
    at = 7 + sum(2 + 7 * (len(each) // 4) for each in of_offers[:offer]) + 2
    demands = zip(
        _in(4, of_offers[offer]), _in(4, numbers), _in(7, wish[at : at + 7 * (len(numbers) // 4)]), strict=True
    )
    own = (
        Line(balance, Kind(kind), Unit(unit), start, fixed + per_output * cap, spent)
        for (balance, kind, unit, spent), (*_, start), (_, fixed, per_output, *_) in demands
        if kind != _CONCURRENT
    )
    return _Hold(wish[1], offer, cap, (*_lines(taken_over or ()), *own), draft)


def _cut(kept: bytes, *lengths: int) -> list[bytes]:
    """Strings of these lengths, and what is left."""
    parts = []
    for length in lengths:
        parts.append(kept[:length])
        kept = kept[length:]
    return [*parts, kept]


def _in(width: int, values: Iterable[Any]) -> Iterable[tuple[Any, ...]]:
    return zip(*[iter(values)] * width, strict=True)


def _state(name: str, kept: bytes) -> BalanceState:
    if len(kept) == _KEPT_BYTES:
        kind = chr(kept[0])
        numbers = (int.from_bytes(kept[a:b], signed=True) for a, b in _KEPT_PLACES)
        start, spent, held, rem, stamp, tick, changes = numbers
    else:  # an earlier version kept msgpack
        kind, start, spent, held, rem, stamp, _rate, _period, tick, changes, _until = _decode(kept)
    return BalanceState(name, _KINDS[kind], start, spent, held, changes, rem, stamp * tick)


def _position(entry_id: bytes) -> str:
    """A stream's id, written so that the order of strings is the order of entries."""
    ms, _, number = entry_id.decode().partition("-")
    return f"{int(ms):015d}-{int(number):015d}"


def _stream_id(position: str) -> str:
    ms, _, number = position.partition("-")
    return f"{int(ms)}-{int(number)}"


def _entries(entries: Sequence[Any]) -> Entries:
    return tuple(_entry(entry_id, dict(zip(values[::2], values[1::2], strict=True))) for entry_id, values in entries)


def _entry(entry_id: bytes, fields: dict[bytes, bytes]) -> JournalEntry | Unreadable:
    position = _position(entry_id)
    try:
        kind, at = EntryKind(fields[b"kind"].decode()), int(fields[b"at"])
        name, lines, payload, offer, cap = _entered(kind, fields)
    except Exception as error:  # whatever it is, no script of ours wrote it
        reason = f"{type(error).__name__}: {error}"
        at = int(position.partition("-")[0])
        return Unreadable(f"journal/{position}", EntryKind.REFUSED, at, (), repr(fields).encode(), reason, position)
    try:
        event = read_event(kind, at, payload, offer=offer, cap=cap)
    except Exception as error:  # written by another version, or damaged
        return Unreadable(name, kind, at, lines, payload, f"{type(error).__name__}: {error}", position=position)
    return JournalEntry(name, kind, at, lines, event, position=position)


def _entered(kind: EntryKind, fields: dict[bytes, bytes]) -> tuple[str, tuple[Line, ...], bytes, int, int]:
    """The id of an entry, the lines it moved, payload or draft, and the offer and cap that an abandoned one has."""
    if b"said" in fields:
        said = _decode(fields[b"lines"])
        exchange, *_, name = (numbers := _unflat(fields[b"said"], 6 + 3 * (len(said) // 4)))[:6]
        lines = tuple(
            Line(balance, Kind(sort), Unit(unit), start, amount, spent)
            for (balance, sort, unit, spent), (start, held, actual) in zip(
                _in(4, said), _in(3, numbers[6:]), strict=True
            )
            if (amount := actual - held if kind is EntryKind.CORRECTION else actual)
        )
        return name or f"{exchange}/{kind}", lines, fields[b"payload"], -1, -1
    if b"hold" in fields:
        hold = _hold(fields[b"hold"])
        return f"{fields[b'exchange'].decode()}/{kind}", hold.lines, hold.draft, hold.offer, hold.cap
    lines = _lines(_decode(fields[b"lines"]))  # an earlier version entered whole lines
    return fields[b"id"].decode(), lines, fields[b"payload"], int(fields[b"offer"]), int(fields[b"cap"])

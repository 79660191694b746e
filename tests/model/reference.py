"""The account in plain Python: the definitions of docs/explanation/accounting.md, and nothing else.

Every store has to agree with this one on every history. It is written for reading, not for speed: dicts, one
clock that the test holds in its hand, each operation from top to bottom as the definitions have it. It shares
no code with the stores but the values, `drain` (which has properties of its own) and `read_event`.

What the definitions leave open, and how it is answered here:

- Tombstones and members past their time stay until something drops them: `expire`, and for members a reserve
  that looks at their balance. Until then they count (tombstones) and can be renewed (members).
- Windows are looked up offer by offer, so an offer that nobody reached cannot make the clock an issue.
- The end of a window is known only if it is one of those sent.
- A bucket has stood there empty since the epoch, so that forgetting an empty one changes nothing. One that a
  booking opened has no rate yet; it drains from that booking on, once a reserve brings one.
- A concurrency balance is a set of calls, and no page of balances lists it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field

from msgspec.structs import replace

from llm_guard_mw.arithmetic import MS_PER_DAY, drain
from llm_guard_mw.model import FOREVER, Demand, EntryKind, JournalEntry, Kind, Line, Offer, Window
from llm_guard_mw.stores.journal import read_event
from llm_guard_mw.stores.protocol import (
    ABANDONED_TOMBSTONE_MS,
    LATE_SETTLE_MS,
    LEFT_ALONE_MS,
    TOMBSTONE_MS,
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


@dataclass(slots=True)
class Balance:
    """What is kept under one name. A bucket's `spent` is its `used`, drained up to `stamp`."""

    kind: Kind
    window_start: int = 0
    window_end: int | None = None
    spent: int = 0
    held: int = 0
    rem: int = 0
    stamp: int = 0  # ticks; ms while there is no rate
    rate: int = 0
    period: int = 0
    tick: int = 1
    changes: int = 0

    def describe(self, rate: int, period: int, tick: int) -> None:
        """How this bucket drains from now on."""
        if not self.rate:
            self.stamp //= tick
        self.rate, self.period, self.tick = rate, period, tick

    def drain_to(self, now: int) -> None:
        if self.rate:
            ticks = now // self.tick
            self.spent, self.rem, self.stamp = drain(self.spent, self.rem, self.stamp, ticks, self.rate, self.period)
        else:
            self.stamp = max(self.stamp, now)

    def roll_to(self, start: int, end: int | None) -> None:
        """Open a later window, in which nothing is spent or held. A balance never moves to an earlier one."""
        if start > self.window_start:
            self.window_start, self.window_end, self.spent, self.held = start, end, 0, 0

    def standing(self) -> Standing:
        return Standing(self.spent, self.held, self.rem, self.window_start, self.window_end)


@dataclass(slots=True)
class Hold:
    call: str
    lease_end: int
    lines: tuple[Line, ...]
    offer: int
    cap: int
    draft: bytes
    took: bool


@dataclass(slots=True)
class Tombstone:
    ending: str  # "settle", "release", "orphan", "taken", "abandoned", "corrected"
    until: int


@dataclass(slots=True)
class ReferenceStore:
    """The protocol's methods, one after the other; `clock` gives ms since the epoch."""

    clock: Callable[[], int]
    #: A delivery whose time is so far ahead was written by a clock that was wrong. (Redis has its own idle times.)
    delivery_ahead_ms: int = FOREVER
    _balances: dict[str, Balance] = field(default_factory=dict)
    _members: defaultdict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))  # call -> lease end
    _holds: dict[str, Hold] = field(default_factory=dict)
    _tombstones: dict[str, Tombstone] = field(default_factory=dict)
    _journal: list[JournalEntry | Unreadable] = field(default_factory=list)
    _in_hand: dict[str, tuple[str, int]] = field(default_factory=dict)  # position: consumer, since when
    _attended_until: int = 0
    _entered: int = 0
    _scope_values: dict[tuple[str, str, str], int] = field(default_factory=dict)  # -> the day it was new
    _replayed: dict[str, int] = field(default_factory=dict)  # spool -> how far

    # ---------------------------------------------------------------- reserve

    def reserve(self, wish: Reserve) -> Granted | Refused | ClockApart | TooLate:
        now = self.clock()
        if wish.not_after is not None and now > wish.not_after:
            return TooLate(now)
        if wish.exchange in self._holds:
            return self._granted_before(now, wish)
        if wish.exchange in self._tombstones:
            return TooLate(now)
        outcome = self._attempt(now, wish)
        if isinstance(outcome, Refused) and any(hold.lease_end <= now for hold in self._holds.values()):
            self.expire()
            outcome = self._attempt(now, wish)
        return outcome

    def _attempt(self, now: int, wish: Reserve) -> Granted | Refused | ClockApart:
        standings: list[tuple[Standing, ...]] = []
        shorts: list[tuple[int, ...]] = []
        for index, offer in enumerate(wish.offers):
            seen = self._see(now, offer)
            if seen is None:
                return ClockApart(now)
            if wish.force:
                return self._grant(now, wish, index, offer.cap, seen, self._short(wish, offer, offer.cap, seen))
            cap = self._largest_cap(wish, offer, seen)
            if cap is not None:
                return self._grant(now, wish, index, cap, seen, ())
            standings.append(tuple(self._without_taken(wish, d, b) for d, b in zip(offer.demands, seen, strict=True)))
            shorts.append(self._short(wish, offer, min(offer.at_least, offer.cap), seen))
        return Refused(tuple(standings), tuple(shorts), now)

    def _see(self, now: int, offer: Offer) -> list[Balance] | None:
        """The balances of an offer as they stand now, as copies. None: the windows sent are not those of now."""
        seen = []
        for demand in offer.demands:
            if demand.kind is Kind.CONCURRENT:
                seen.append(Balance(demand.kind, spent=len(self._members_now(now, demand.balance))))
                continue
            kept = self._balances.get(demand.balance)
            balance = Balance(demand.kind) if kept is None else copy(kept)
            if demand.kind is Kind.CALENDAR:
                window = _window_of(demand.windows, now)
                if window is None:
                    return None
                balance.roll_to(window.start, window.end)
                ends = {each.start: each.end for each in demand.windows}
                balance.window_end = ends.get(balance.window_start)
            elif demand.kind is Kind.BUCKET:
                balance.describe(demand.rate, demand.period, demand.tick)
                balance.drain_to(now)
            seen.append(balance)
        return seen

    def _members_now(self, now: int, name: str) -> dict[str, int]:
        members = self._members[name]
        for call in [call for call, lease_end in members.items() if lease_end <= now]:
            del members[call]
        return members

    def _largest_cap(self, wish: Reserve, offer: Offer, seen: Sequence[Balance]) -> int | None:
        """The largest output cap in [at_least, cap] that all balances bear, or None."""
        candidates = {offer.cap}
        for demand, balance in zip(offer.demands, seen, strict=True):
            if demand.per_output:
                candidates.add((self._room(wish, demand, balance) - demand.fixed) // demand.per_output)
        at_least = min(offer.at_least, offer.cap)
        good = [cap for cap in candidates if at_least <= cap <= offer.cap and not self._short(wish, offer, cap, seen)]
        return max(good, default=None)

    def _short(self, wish: Reserve, offer: Offer, cap: int, seen: Sequence[Balance]) -> tuple[int, ...]:
        """The demands that do not fit with this cap."""
        return tuple(
            index
            for index, (demand, balance) in enumerate(zip(offer.demands, seen, strict=True))
            if not (demand.kind is Kind.CONCURRENT and wish.call in self._members[demand.balance])
            and _claim(demand, cap) > self._room(wish, demand, balance)
        )

    def _room(self, wish: Reserve, demand: Demand, balance: Balance) -> int:
        """What the demand may claim, as if the exchange it takes from held nothing."""
        standing = self._without_taken(wish, demand, balance)
        return demand.ceiling - standing.spent - standing.held

    def _without_taken(self, wish: Reserve, demand: Demand, balance: Balance) -> Standing:
        taken = self._holds.get(wish.takes or "")
        freed = sum(
            line.amount
            for line in (taken.lines if taken else ())
            if not line.spent and (line.balance, line.window_start) == (demand.balance, balance.window_start)
        )
        return replace(balance.standing(), held=balance.held - freed)

    def _grant(
        self, now: int, wish: Reserve, index: int, cap: int, seen: Sequence[Balance], short: tuple[int, ...]
    ) -> Granted:
        offer = wish.offers[index]
        lease_end = now + wish.lease_ms
        lines: list[Line] = []
        for demand, balance in zip(offer.demands, seen, strict=True):
            if demand.kind is Kind.CONCURRENT:
                self._members[demand.balance][wish.call] = lease_end
                continue
            amount = _claim(demand, cap)
            if demand.spent_at_reserve:
                balance.spent += amount
            else:
                balance.held += amount
            balance.changes += 1
            self._balances[demand.balance] = balance
            lines.append(
                Line(demand.balance, demand.kind, demand.unit, balance.window_start, amount, demand.spent_at_reserve)
            )
        took = wish.takes is not None and wish.takes in self._holds
        lines += self._take_over(now, wish.takes)
        self._holds[wish.exchange] = Hold(wish.call, lease_end, tuple(lines), index, cap, wish.draft, took)
        return Granted(index, cap, tuple(lines), self._standings(now, offer), lease_end, now, short, took)

    def _take_over(self, now: int, exchange: str | None) -> list[Line]:
        """End an open hold without an entry: what it held is given back, what it spent goes to the taker."""
        if exchange is None or exchange not in self._holds:
            return []
        hold = self._holds.pop(exchange)
        self._tombstones[exchange] = Tombstone("taken", now + TOMBSTONE_MS)
        for line in hold.lines:
            if not line.spent:
                balance = self._balances[line.balance]
                balance.changes += 1
                if balance.window_start == line.window_start:
                    balance.held -= line.amount
        return [line for line in hold.lines if line.spent]

    def _granted_before(self, now: int, wish: Reserve) -> Granted | ClockApart:
        hold = self._holds[wish.exchange]
        seen = self._see(now, wish.offers[hold.offer])
        if seen is None:
            return ClockApart(now)
        standings = tuple(balance.standing() for balance in seen)
        return Granted(hold.offer, hold.cap, hold.lines, standings, hold.lease_end, now, took=hold.took)

    def _standings(self, now: int, offer: Offer) -> tuple[Standing, ...]:
        return tuple(balance.standing() for balance in self._see(now, offer) or ())

    # ---------------------------------------------------------------- settle

    def settle(self, settlement: Settlement) -> Settled:
        replay = settlement.replay
        if replay is not None:
            if replay.position <= self.replayed(replay.source):
                return Settled.AGAIN
            self._replayed[replay.source] = replay.position
        return self._settle(settlement)

    def replayed(self, source: str) -> int:
        return self._replayed.get(source, 0)

    def end_replay(self, source: str) -> None:
        self._replayed.pop(source, None)

    def _settle(self, settlement: Settlement) -> Settled:
        now = self.clock()
        exchange, kind = settlement.exchange, settlement.kind
        tombstone = self._tombstones.get(exchange)
        too_late = now > settlement.lease_end + LATE_SETTLE_MS

        if tombstone is not None:
            if tombstone.ending != "abandoned":
                return Settled.AGAIN
            if kind is EntryKind.RELEASE and not settlement.moved:
                return Settled.AGAIN
            if too_late:
                return Settled.TOO_LATE
            deltas = _not_zero(
                replace(moved.line, amount=moved.actual - moved.line.amount) for moved in settlement.moved
            )
            for delta in deltas:
                self._move(now, delta, spent=delta.amount)
            self._tombstones[exchange] = Tombstone("corrected", now + ABANDONED_TOMBSTONE_MS)
            self._enter(now, exchange, EntryKind.CORRECTION, deltas, settlement.payload)
            return Settled.CORRECTED

        all_moved = settlement.moved
        unknown = kind is EntryKind.RELEASE and not all_moved and not settlement.fresh
        if unknown and exchange in self._holds:
            lines = self._holds[exchange].lines
            all_moved = tuple(Moved(line, line.amount if line.spent else 0) for line in lines)
        actuals = [replace(moved.line, amount=moved.actual) for moved in all_moved]
        if exchange in self._holds:
            del self._holds[exchange]
            for moved in all_moved:
                if moved.line.spent:
                    self._move(now, moved.line, spent=moved.actual - moved.line.amount)
                else:
                    self._move(now, moved.line, spent=moved.actual, held=-moved.line.amount)
            self._tombstones[exchange] = Tombstone(kind, now + TOMBSTONE_MS)
            self._enter(now, exchange, kind, _not_zero(actuals), settlement.payload)
            return Settled.DONE

        if unknown:
            return Settled.AGAIN
        if too_late and not settlement.fresh:
            return Settled.TOO_LATE
        kind = kind if settlement.fresh else EntryKind.ORPHAN
        for line in actuals:
            balance = self._balances.setdefault(line.balance, Balance(line.kind))
            balance.roll_to(line.window_start, None)
            self._move(now, line, spent=line.amount)
        self._tombstones[exchange] = Tombstone(kind, now + TOMBSTONE_MS)
        self._enter(now, exchange, kind, _not_zero(actuals), settlement.payload)
        return Settled.DONE if settlement.fresh else Settled.ORPHAN

    def _move(self, now: int, line: Line, *, spent: int, held: int = 0) -> None:
        """Move the balance of a line, if it is still in the line's window."""
        balance = self._balances.setdefault(line.balance, Balance(line.kind))  # it may have been forgotten
        balance.changes += 1
        if balance.window_start != line.window_start:
            return
        if balance.kind is Kind.BUCKET:
            balance.drain_to(now)
        balance.spent = max(0, balance.spent + spent)
        balance.held += held

    def _enter(self, now: int, exchange: str, kind: EntryKind, lines: Iterable[Line], payload: bytes) -> None:
        self._append(now, f"{exchange}/{kind}", kind, lines, payload)

    def _append(
        self,
        now: int,
        entry_id: str,
        kind: EntryKind,
        lines: Iterable[Line],
        payload: bytes,
        offer: int | None = None,
        cap: int | None = None,
    ) -> None:
        self._entered += 1
        position = f"{self._entered:012d}"
        try:
            event = read_event(kind, now, payload, offer=offer, cap=cap)
        except Exception as error:
            unreadable = Unreadable(entry_id, kind, now, tuple(lines), payload, repr(error), position=position)
            self._journal.append(unreadable)
        else:
            self._journal.append(JournalEntry(entry_id, kind, now, tuple(lines), event, position=position))

    # ---------------------------------------------------------------- leases

    def renew(self, exchanges: Sequence[str], calls: Sequence[str], lease_ms: int) -> Renewed:
        lease_end = self.clock() + lease_ms
        for exchange in exchanges:
            if exchange in self._holds:
                self._holds[exchange].lease_end = lease_end
        for members in self._members.values():
            for call in calls:
                if call in members:
                    members[call] = lease_end
        return Renewed(lease_end, tuple(exchange for exchange in exchanges if exchange not in self._holds))

    def expire(self, most: int = 1000) -> int:
        now = self.clock()
        due = sorted((hold.lease_end, exchange) for exchange, hold in self._holds.items() if hold.lease_end <= now)
        for _, exchange in due[:most]:
            hold = self._holds.pop(exchange)
            for line in hold.lines:
                if line.spent:
                    self._move(now, line, spent=0)
                else:
                    self._move(now, line, spent=line.amount, held=-line.amount)
            self._tombstones[exchange] = Tombstone("abandoned", now + ABANDONED_TOMBSTONE_MS)
            kind = EntryKind.ABANDONED
            self._append(now, f"{exchange}/{kind}", kind, hold.lines, hold.draft, hold.offer, hold.cap)
        # A tombstone holds up to and with `until`: a settle that comes in the last moment in which it may still
        # correct has to find it.
        self._tombstones = {exchange: stone for exchange, stone in self._tombstones.items() if stone.until >= now}
        for name in list(self._members):
            self._members_now(now, name)
        return len(due[:most])

    def forget(self, most: int = 1000) -> int:
        """Drop what has said nothing for a day: windows that are over, buckets that are empty."""
        now = self.clock()
        silent = [name for name, balance in sorted(self._balances.items()) if _silent(balance, now - MS_PER_DAY)]
        for name in silent[:most]:
            del self._balances[name]
        return len(silent[:most])

    def close_call(self, call: str) -> None:
        for members in self._members.values():
            members.pop(call, None)

    def admit(self, parent: str, scope: str, value: str, day: int, most: int) -> bool:
        if (parent, scope, value) in self._scope_values:
            return True
        new_today = [key for key, since in self._scope_values.items() if key[:2] == (parent, scope) and since == day]
        if len(new_today) >= most:
            return False
        self._scope_values[parent, scope, value] = day
        return True

    # ---------------------------------------------------------------- the journal

    def append(self, entry_id: str, payload: bytes) -> None:
        if all(entry.id != entry_id for entry in self._journal):
            self._append(self.clock(), entry_id, EntryKind.REFUSED, (), payload)

    def read_journal(self, after: str, count: int) -> Sequence[JournalEntry | Unreadable]:
        return tuple(entry for entry in self._journal if entry.position > after)[:count]

    def take_journal(
        self, consumer: str, count: int, idle_ms: int = LEFT_ALONE_MS
    ) -> Sequence[JournalEntry | Unreadable]:
        now = self.clock()
        mine, left_alone, new = [], [], []
        for entry in self._journal:
            holder, since = self._in_hand.get(entry.position, (None, 0))
            if holder is None:
                new.append(entry)
            elif holder == consumer:
                mine.append(entry)
            elif since <= now - idle_ms or since > now + self.delivery_ahead_ms:
                left_alone.append(entry)
        taken = (mine or left_alone or new)[:count]
        self._in_hand |= {entry.position: (consumer, now) for entry in taken}
        return tuple(taken)

    def drop_journal(self, positions: Sequence[str]) -> None:
        gone = set(positions)
        self._journal = [entry for entry in self._journal if entry.position not in gone]
        for position in gone:
            self._in_hand.pop(position, None)

    def attend(self, for_ms: int) -> None:
        self._attended_until = self.clock() + for_ms

    def attended(self) -> bool:
        return self.clock() < self._attended_until

    def journal_length(self) -> int:
        return len(self._journal)

    # ---------------------------------------------------------------- reading

    def peek(self, balances: Sequence[str]) -> Sequence[BalanceState]:
        return tuple(self._state(name) for name in balances if name in self._balances)

    def balances(self, after: str, count: int) -> Sequence[BalanceState]:
        return self.peek(sorted(name for name in self._balances if name > after)[:count])

    def _state(self, name: str) -> BalanceState:
        kept = self._balances[name]
        stamp = kept.stamp * kept.tick
        return BalanceState(name, kept.kind, kept.window_start, kept.spent, kept.held, kept.changes, kept.rem, stamp)

    def holds(self, after: str, count: int) -> Sequence[HoldState]:
        page = sorted(exchange for exchange in self._holds if exchange > after)[:count]
        return tuple(
            HoldState(exchange, hold.call, hold.lease_end, hold.lines)
            for exchange, hold in ((exchange, self._holds[exchange]) for exchange in page)
        )

    def epoch(self) -> str:
        return f"reference-{id(self):x}"

    def now(self) -> int:
        return self.clock()

    def close(self) -> None:
        """There is nothing to close: what is kept ends with the object."""


def _window_of(windows: Iterable[Window], now: int) -> Window | None:
    return next((window for window in windows if window.start <= now < window.end), None)


def _claim(demand: Demand, cap: int) -> int:
    return demand.fixed + demand.per_output * cap


def _not_zero(lines: Iterable[Line]) -> list[Line]:
    return [line for line in lines if line.amount]


def _silent(balance: Balance, since: int) -> bool:
    if balance.held:
        return False
    if balance.kind is Kind.CALENDAR:
        return balance.window_end is not None and balance.window_end <= since
    if balance.kind is Kind.BUCKET and balance.rate:
        at_leisure = copy(balance)
        at_leisure.drain_to(since)
        return at_leisure.spent == 0 and at_leisure.stamp <= since // balance.tick
    return False

"""Every store agrees with the reference model on every history, and the laws hold all along.

Two stores live through one random history under one clock: whatever the one answers, the other has to answer,
and after each step they have to have the same balances, holds and entries. `LLM_GUARD_HYPOTHESIS=deep` tries
many more and longer histories.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from msgspec.structs import replace

from llm_guard_mw.model import FOREVER, Demand, EntryKind, JournalEntry, Kind, Line, Offer, Unit, Window
from llm_guard_mw.stores.journal import encode_event
from llm_guard_mw.stores.protocol import (
    LATE_SETTLE_MS,
    TOMBSTONE_MS,
    BalanceState,
    Granted,
    HoldState,
    Moved,
    Replay,
    Reserve,
    Settled,
    Settlement,
    Store,
    Unreadable,
)
from tests.model.reference import ReferenceStore
from tests.model.world import HOUR, LEASE, MINUTE, SECOND, STORES, Clock, event_of, make_store, settlement, wish

DEEP = os.environ.get("LLM_GUARD_HYPOTHESIS") == "deep"

# ---------------------------------------------------------------- a small world


@dataclass(frozen=True)
class Kept:
    """One balance of the small world. `length` is its window (ms) or the period of its bucket (ticks)."""

    name: str
    kind: Kind
    unit: Unit
    length: int = 0
    tick: int = 1


WORLD = (
    Kept("dollars", Kind.CALENDAR, Unit.USD, 10 * MINUTE),
    Kept("more-dollars", Kind.CALENDAR, Unit.USD, HOUR),
    Kept("pot", Kind.TOTAL, Unit.CREDITS),
    Kept("tpm", Kind.BUCKET, Unit.TOKENS, MINUTE),
    Kept("slow", Kind.BUCKET, Unit.TOKENS, 2 * 86_400, SECOND),
    Kept("rpm", Kind.BUCKET, Unit.REQUESTS, MINUTE),
    Kept("rpd", Kind.CALENDAR, Unit.REQUESTS, HOUR),
    Kept("calls", Kind.CONCURRENT, Unit.CONCURRENT),
)
MONEY = tuple(kept for kept in WORLD if kept.kind is not Kind.CONCURRENT)
CALLS = ("a", "b", "c")
STEPS_MS = (1, 999, 7 * SECOND, 40 * SECOND, LEASE - 1, LEASE, TOMBSTONE_MS, 10 * MINUTE, HOUR, LATE_SETTLE_MS + LEASE)
BACK_MS = (1, SECOND, 30 * SECOND, 10 * MINUTE, HOUR)


def _windows(kept: Kept, at: int) -> tuple[Window, Window]:
    start = at // kept.length * kept.length
    return Window(start, start + kept.length), Window(start + kept.length, start + 2 * kept.length)


@st.composite
def demands(draw: st.DrawFn, kept: Kept, at: int, rate: int) -> Demand:
    if kept.kind is Kind.CONCURRENT:
        return Demand(kept.name, kept.kind, kept.unit, draw(st.integers(0, 3)), 1)
    once = kept.unit is Unit.REQUESTS
    bucket = kept.kind is Kind.BUCKET
    return Demand(
        kept.name,
        kept.kind,
        kept.unit,
        ceiling=draw(st.sampled_from([5, 30, 60, 100, 200, 200])),
        fixed=1 if once else draw(st.integers(0, 12)),
        per_output=0 if once else draw(st.sampled_from([0, 1, 3])),
        rate=rate if bucket else 0,
        period=kept.length if bucket else 0,
        tick=kept.tick if bucket else 1,
        windows=_windows(kept, at) if kept.kind is Kind.CALENDAR else (),
    )


@st.composite
def offers(draw: st.DrawFn, at: int, rate: int) -> Offer:
    chosen = draw(st.lists(st.sampled_from(WORLD), max_size=4, unique=True))
    cap = draw(st.integers(0, 20))
    wanted = tuple(draw(demands(kept, at, rate)) for kept in chosen)
    return Offer(draw(st.sampled_from(["allow", "degrade"])), "m", wanted, cap, draw(st.integers(0, cap)))


# ---------------------------------------------------------------- the two lives


@dataclass
class Known:
    """What the owner of an exchange knows about it."""

    lines: tuple[Line, ...]
    lease_end: int


class TwoLives(RuleBasedStateMachine):
    """Each rule does one thing to both stores and compares the answers; the invariants compare what is kept."""

    store_name: str

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.reference = ReferenceStore(self.clock, 60_000 if self.store_name == "sqlite" else FOREVER)
        self.closing = ExitStack()
        self.wishes: list[Reserve] = []
        self.known: dict[str, Known] = {}
        self.entries: dict[str, JournalEntry] = {}  # all there ever were, by id
        self.read_up_to = "", ""
        self.changes: Counter[str] = Counter()
        self.changes_seen: Counter[str] = Counter()

    @initialize()
    def open(self) -> None:
        folder = self.closing.enter_context(TemporaryDirectory(ignore_cleanup_errors=True))
        self.store = make_store(self.store_name, self.clock, Path(folder))
        self.closing.callback(self.store.close)

    def teardown(self) -> None:
        self.closing.close()

    def both(self, do: Callable[[Store], object]) -> object:
        expected, actual = do(self.reference), do(self.store)
        assert _unordered(actual) == _unordered(expected)
        return expected

    def ended_and_forgotten(self, exchange: str) -> bool:
        """Nobody remembers this ending any more, so that a message about it would count as news."""
        return exchange not in self.reference._holds and exchange not in self.reference._tombstones

    # -- time

    @rule(step=st.sampled_from(STEPS_MS))
    def time_passes(self, step: int) -> None:
        self.clock.forward(step)

    @rule(step=st.sampled_from(BACK_MS))
    def the_clock_jumps_back(self, step: int) -> None:
        self.clock.forward(-step)

    # -- reserve: twice, so that it is tried twice as often as anything else

    @rule(data=st.data(), call=st.sampled_from(CALLS))
    def reserve(self, data: st.DataObject, call: str) -> None:
        self._reserve(data, call, 0)

    @rule(data=st.data(), call=st.sampled_from(CALLS), skew=st.sampled_from([0, 0, -10 * MINUTE, HOUR]))
    def reserve_by_a_clock_of_ones_own(self, data: st.DataObject, call: str, skew: int) -> None:
        self._reserve(data, call, skew)

    def _reserve(self, data: st.DataObject, call: str, skew: int) -> None:
        rate = data.draw(st.sampled_from([60, 60, 7, 100_003]), "rate")
        wanted = data.draw(st.lists(offers(self.clock.now + skew, rate), min_size=1, max_size=3), "offers")
        wished = wish(
            f"{call}/{len(self.wishes)}",
            *wanted,
            takes=data.draw(st.sampled_from([None, *list(self.known)[-6:]]), "takes"),
            not_after=self.clock.now + 2 * SECOND,
            lease_ms=data.draw(st.sampled_from([LEASE, LEASE, SECOND, HOUR]), "lease_ms"),
            force=data.draw(st.sampled_from([False, False, False, True]), "force"),
        )
        self.wishes.append(wished)
        members = set(self.reference._members["calls"])  # those in by now fit without being counted again

        outcome = self.both(lambda store: store.reserve(wished))

        if isinstance(outcome, Granted):
            self.known[wished.exchange] = Known(outcome.lines, outcome.lease_end)
            if not wished.force:
                self._no_overrun(wished, outcome, members)

    def _no_overrun(self, wished: Reserve, granted: Granted, members: set[str]) -> None:
        for demand, standing in zip(wished.offers[granted.offer].demands, granted.standings, strict=True):
            if demand.kind is not Kind.CONCURRENT or wished.call not in members:
                assert standing.spent + standing.held <= demand.ceiling

    @precondition(lambda self: self.wishes)
    @rule(data=st.data())
    def reserve_again(self, data: st.DataObject) -> None:
        wished = data.draw(st.sampled_from(self.wishes[-6:]))
        if wished.exchange in self.known and self.ended_and_forgotten(wished.exchange):
            return

        outcome = self.both(lambda store: store.reserve(wished))

        if isinstance(outcome, Granted):
            self.known.setdefault(wished.exchange, Known(outcome.lines, outcome.lease_end))

    # -- settle

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        self._settle(data, EntryKind.SETTLE)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), kind=st.sampled_from([EntryKind.SETTLE, EntryKind.RELEASE]))
    def settle_or_release(self, data: st.DataObject, kind: EntryKind) -> None:
        self._settle(data, kind)

    def _settle(self, data: st.DataObject, kind: EntryKind) -> None:
        exchange = data.draw(st.sampled_from(list(self.known)[-8:]))
        known = self.known[exchange]
        if self.ended_and_forgotten(exchange) and self.clock.now <= known.lease_end + LATE_SETTLE_MS:
            return
        actual = {
            line.balance: line.amount if line.spent else data.draw(st.integers(0, line.amount + 10))
            for line in known.lines
        }
        ending = settlement(
            exchange, known.lines, known.lease_end, actual if kind is EntryKind.SETTLE else None, kind=kind
        )

        self.both(lambda store: store.settle(ending))

    @precondition(lambda self: self.wishes)
    @rule(data=st.data())
    def release_what_was_never_learnt(self, data: st.DataObject) -> None:
        exchange = data.draw(st.sampled_from(self.wishes[-6:])).exchange
        ending = settlement(exchange, (), self.clock.now, kind=EntryKind.RELEASE)

        self.both(lambda store: store.settle(ending))

    @rule(
        data=st.data(),
        fresh=st.booleans(),
        lease_end=st.sampled_from([LEASE, -MINUTE, -LATE_SETTLE_MS, -LATE_SETTLE_MS - 1]),
        skew=st.sampled_from([0, 0, 0, -HOUR]),
    )
    def book_without_a_hold(self, data: st.DataObject, fresh: bool, lease_end: int, skew: int) -> None:
        chosen = data.draw(st.lists(st.sampled_from(MONEY), min_size=1, max_size=3, unique=True))
        moved = []
        for kept in chosen:
            start = _windows(kept, self.clock.now + skew)[0].start if kept.kind is Kind.CALENDAR else 0
            line = Line(kept.name, kept.kind, kept.unit, start, 0, kept.unit is Unit.REQUESTS)
            moved.append(Moved(line, data.draw(st.integers(0, 30))))
        exchange = f"{data.draw(st.sampled_from(CALLS))}/{len(self.known) + 1000}"
        end = self.clock.now + lease_end
        payload = encode_event(event_of(exchange, cost_nanos=1))
        booking = Settlement(exchange, exchange[0], EntryKind.SETTLE, end, tuple(moved), payload, fresh)

        outcome = self.both(lambda store: store.settle(booking))

        if outcome is not Settled.TOO_LATE:
            self.known[exchange] = Known(tuple(each.line for each in moved), end)

    @rule(
        data=st.data(),
        source=st.sampled_from("st"),
        position=st.integers(1, 12),
        kind=st.sampled_from([EntryKind.SETTLE, EntryKind.SETTLE, EntryKind.RELEASE]),
    )
    def replay_a_spool(self, data: st.DataObject, source: str, position: int, kind: EntryKind) -> None:
        kept = data.draw(st.sampled_from(MONEY))
        start = _windows(kept, self.clock.now)[0].start if kept.kind is Kind.CALENDAR else 0
        line = Line(kept.name, kept.kind, kept.unit, start, 0, kept.unit is Unit.REQUESTS)
        exchange = f"{source}/{position}"
        payload = encode_event(event_of(exchange, cost_nanos=1))
        replay = Replay(source, position)
        moved = (Moved(line, data.draw(st.integers(0, 30))),)

        self.both(
            lambda store: store.settle(
                Settlement(exchange, source, kind, self.clock.now, moved, payload, fresh=True, replay=replay)
            )
        )

        self.both(lambda store: store.replayed(source))

    # -- leases and calls

    @rule(data=st.data(), calls=st.lists(st.sampled_from(CALLS), unique=True))
    def renew(self, data: st.DataObject, calls: list[str]) -> None:
        exchanges = data.draw(st.lists(st.sampled_from(["nobody/1", *list(self.known)[-6:]]), unique=True))
        lease_ms = data.draw(st.sampled_from([LEASE, HOUR]))

        self.both(lambda store: store.renew(exchanges, calls, lease_ms))

        for exchange in exchanges:
            if exchange in self.reference._holds:
                self.known[exchange].lease_end = self.clock.now + lease_ms

    @rule(most=st.sampled_from([1, 2, 1000, 1000]))
    def expire(self, most: int) -> None:
        self.both(lambda store: store.expire(most))

    @rule(step=st.sampled_from([LEASE, HOUR]))
    def owners_go_away(self, step: int) -> None:
        self.clock.forward(step)
        self.both(lambda store: store.expire())

    @rule(data=st.data(), do=st.sampled_from(["close_call", "admit", "append", "drain"]))
    def keep_house(self, data: st.DataObject, do: str) -> None:
        getattr(self, f"_{do}")(data)

    def _close_call(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(CALLS))
        self.both(lambda store: store.close_call(call))

    def _admit(self, data: st.DataObject) -> None:
        parent, value = data.draw(st.sampled_from("xy")), data.draw(st.sampled_from("pqr"))
        day, most = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 2))
        self.both(lambda store: store.admit(parent, "tag:team", value, day, most))

    def _append(self, data: st.DataObject) -> None:
        entry_id = f"z/{data.draw(st.integers(0, 3))}/refused"
        if entry_id in self.entries and not _in_journal(self.reference, entry_id):
            return  # it was trimmed, so that nobody would know it again
        self.both(lambda store: store.append(entry_id, encode_event(event_of("z/1"))))

    def _drain(self, data: st.DataObject) -> None:
        consumer, count, commits = (
            data.draw(st.sampled_from("ab")),
            data.draw(st.integers(1, 5)),
            data.draw(st.booleans()),
        )
        expected, actual = (store.take_journal(consumer, count, 10**12) for store in (self.reference, self.store))

        assert [entry.id for entry in actual] == [entry.id for entry in expected]
        if commits:
            self.reference.drop_journal([entry.position for entry in expected])
            self.store.drop_journal([entry.position for entry in actual])

    # -- what has to hold after each step

    @invariant()
    def they_keep_the_same_balances(self) -> None:
        expected, actual = (_all_balances(store) for store in (self.reference, self.store))

        assert [replace(state, changes=0) for state in actual] == [replace(state, changes=0) for state in expected]
        grown = {state.balance for state in expected if state.changes > self.changes[state.balance]}
        seen = {state.balance for state in actual if state.changes > self.changes_seen[state.balance]}
        assert grown <= seen
        self.changes = Counter({state.balance: state.changes for state in expected})
        self.changes_seen = Counter({state.balance: state.changes for state in actual})

    @invariant()
    def they_keep_the_same_holds(self) -> None:
        expected, actual = (_all_holds(store) for store in (self.reference, self.store))

        assert [_unordered(hold) for hold in actual] == [_unordered(hold) for hold in expected]

    @invariant()
    def they_enter_the_same_entries(self) -> None:
        expected = self.reference.read_journal(self.read_up_to[0], 1000)
        actual = self.store.read_journal(self.read_up_to[1], 1000)

        assert [_of_any_place(entry) for entry in actual] == [_of_any_place(entry) for entry in expected]
        assert self.store.journal_length() == self.reference.journal_length()
        if expected:
            self.read_up_to = expected[-1].position, actual[-1].position
        for entry in expected:
            assert entry.id not in self.entries, "entered twice"
            self.entries[entry.id] = _of_any_place(entry)

    @invariant()
    def an_exchange_is_closed_once_and_corrected_once(self) -> None:
        closed = Counter(entry_id.rpartition("/")[0] for entry_id, entry in self.entries.items() if _closes(entry))

        assert all(times == 1 for times in closed.values())
        assert not closed.keys() & self.reference._holds.keys()

    @invariant()
    def what_is_held_is_the_sum_of_the_open_lines(self) -> None:
        held: Counter[tuple[str, int]] = Counter()
        for hold in _all_holds(self.store):
            for line in hold.lines:
                held[line.balance, line.window_start] += 0 if line.spent else line.amount

        for state in _all_balances(self.store):
            assert state.held == held[state.balance, state.window_start]

    @invariant()
    def what_is_spent_is_the_sum_of_the_entries(self) -> None:
        """Law 4, for budgets: `spent` = the entries' lines + the requests of exchanges that are still open."""
        spent: defaultdict[tuple[str, int], int] = defaultdict(int)
        for entry in self.entries.values():
            for line in entry.lines:
                spent[line.balance, line.window_start] += line.amount
        for hold in _all_holds(self.store):
            for line in hold.lines:
                spent[line.balance, line.window_start] += line.amount if line.spent else 0

        for state in _all_balances(self.store):
            if state.kind is not Kind.BUCKET:
                assert state.spent == spent[state.balance, state.window_start]


def _unordered(answer: object) -> object:
    """The order of lines says nothing."""
    if isinstance(answer, Granted | HoldState):
        return replace(answer, lines=_sorted(answer.lines))
    return answer


def _sorted(lines: Iterable[Line]) -> tuple[Line, ...]:
    return tuple(sorted(lines, key=lambda line: (line.balance, line.window_start, line.spent, line.amount)))


def _of_any_place(entry: JournalEntry | Unreadable) -> JournalEntry:
    assert isinstance(entry, JournalEntry)
    return replace(entry, position="", partition="", lines=_sorted(entry.lines))


def _closes(entry: JournalEntry) -> bool:
    return entry.kind not in (EntryKind.CORRECTION, EntryKind.REFUSED)


def _in_journal(store: Store, entry_id: str) -> bool:
    return any(entry.id == entry_id for entry in store.read_journal("", 1000))


def _all_balances(store: Store) -> Sequence[BalanceState]:
    return store.balances("", 1000)


def _all_holds(store: Store) -> Sequence[HoldState]:
    return store.holds("", 1000)


@pytest.mark.parametrize("name", sorted(STORES))
def test_a_store_agrees_with_the_reference_on_every_history(name: str) -> None:
    lives = type(f"TwoLives_{name}", (TwoLives,), {"store_name": name})

    run_state_machine_as_test(
        lives,
        settings=settings(
            max_examples=3000 if DEEP else 40,
            stateful_step_count=80 if DEEP else 50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )

"""The limits of one process that guards alone, while the store is away.

It answers a Reserve as a store would, out of counters in memory (`limits`, memory storage), each process by itself:
a limit then holds for each process, so that what may be overrun is the limit times the processes.

Rule 1. All lines of an offer, or nothing; the first offer that fits; concurrency is a set of calls.
Rule 2. Each counter is a fixed window: a calendar budget's own one; for a bucket the time in which it fills, which
        lets pass no more within that time than the bucket itself would at its best: its capacity, and once more.
        A total has one window, which never ends here.
Rule 3. A claim counts at once, and is settled to what it really was while its window lasts.
Rule 4. Memory is bounded. A balance too many is no limit that could hold, so that its call is one that the store
        would have had to answer.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_guard_mw.errors import StoreUnavailable
from llm_guard_mw.model import FOREVER, Demand, Kind, Line, Offer, Window
from llm_guard_mw.stores.protocol import Granted, Moved, Refused, Reserve, Standing

if TYPE_CHECKING:
    from limits.storage import MemoryStorage

#: Balances that one process counts. `limits` looks through all of them now and then, and each takes 0.3 kB.
BALANCES_MAX = 10_000

#: A counter may be dropped so long after its window: then nobody touches it any more.
_SLACK_SECONDS = 2


@dataclass(frozen=True, slots=True)
class _Claim:
    """What an open exchange has counted on one balance."""

    line: Line
    key: str
    window: Window


@dataclass(slots=True)
class _Place:
    """Where a demand is counted now, and how it stands there."""

    demand: Demand
    key: str
    window: Window
    count: int
    inside: bool = False  # concurrency: the call that asks is counted already


class LocalCap:
    """One a process; safe to use from many threads. `now` is the store's clock, in ms, as far as it is known here."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: MemoryStorage | None = None
        self._open: dict[str, tuple[_Claim, ...]] = {}
        self._held: Counter[str] = Counter()  # of the counters: what open exchanges have claimed
        self._members: dict[str, set[str]] = {}

    # ------------------------------------------------------------ reserve

    def reserve(self, wish: Reserve, now: int) -> Granted | Refused:
        """Grant the first offer that fits. StoreUnavailable when there are too many balances to count."""
        with self._lock:
            taken = self._open.get(wish.takes or "", ())
            freed = Counter({claim.key: claim.line.amount for claim in taken if not claim.line.spent})
            standings: list[tuple[Standing, ...]] = []
            shorts: list[tuple[int, ...]] = []
            for index, offer in enumerate(wish.offers):
                places = [self._place(demand, wish.call, now) for demand in offer.demands]
                cap, short = _fit(offer, places, freed, offer.cap if wish.force else offer.at_least)
                if not short or wish.force:
                    self._look_for_room(places)
                    cap = offer.cap if wish.force else cap
                    return self._grant(wish, now, index, cap, places, taken, short)
                standings.append(tuple(self._standing(place, freed) for place in places))
                shorts.append(short)
            return Refused(tuple(standings), tuple(shorts), now)

    def _place(self, demand: Demand, call: str, now: int) -> _Place:
        if demand.kind is Kind.CONCURRENT:
            members = self._members.get(demand.balance, set())
            return _Place(demand, demand.balance, Window(0, FOREVER), len(members), call in members)
        window = _window(demand, now)
        key = f"{demand.balance}@{window.start}"
        return _Place(demand, key, window, self._storage().get(key))

    def _standing(self, place: _Place, freed: Counter[str]) -> Standing:
        held = self._held[place.key]
        end = None if place.window.end == FOREVER else place.window.end
        return Standing(place.count - held, held - freed[place.key], 0, place.window.start, end)

    def _look_for_room(self, places: Iterable[_Place]) -> None:
        counters = self._storage().storage
        new = sum(place.key not in counters for place in places if place.demand.kind is not Kind.CONCURRENT)
        if len(counters) + new > BALANCES_MAX:
            raise StoreUnavailable(f"the store is away, and {BALANCES_MAX} balances are counted here already")

    def _grant(
        self,
        wish: Reserve,
        now: int,
        index: int,
        cap: int,
        places: Sequence[_Place],
        taken: Sequence[_Claim],
        short: tuple[int, ...],
    ) -> Granted:
        took = wish.takes is not None and wish.takes in self._open
        claims = []
        if took:
            claims += [claim for claim in taken if claim.line.spent]
            self._give_back(wish.takes or "", now)
        for place in places:
            demand = place.demand
            if demand.kind is Kind.CONCURRENT:
                self._members.setdefault(demand.balance, set()).add(wish.call)
                continue
            amount = demand.fixed + demand.per_output * cap
            self._count(place.key, place.window, amount, now)
            start = place.window.start if demand.kind is Kind.CALENDAR else 0
            line = Line(demand.balance, demand.kind, demand.unit, start, amount, demand.spent_at_reserve)
            claims.append(_Claim(line, place.key, place.window))
            if not line.spent:
                self._held[place.key] += amount
        self._open[wish.exchange] = tuple(claims)
        after = tuple(self._standing(self._place(place.demand, wish.call, now), Counter()) for place in places)
        lines = tuple(claim.line for claim in claims)
        return Granted(index, cap, lines, after, now + wish.lease_ms, now, short, took)

    # ------------------------------------------------------------ settle

    def settle(self, exchange: str, moved: Iterable[Moved], now: int) -> None:
        """Count what an exchange really used, instead of what it claimed. A second time changes nothing."""
        with self._lock:
            actual = {each.line.balance: each.actual for each in moved}
            for claim in self._close(exchange):
                if not claim.line.spent:
                    used = actual.get(claim.line.balance, claim.line.amount)
                    self._count(claim.key, claim.window, used - claim.line.amount, now)

    def forget(self, exchange: str, now: int) -> None:
        """As if it had never been granted."""
        with self._lock:
            for claim in self._close(exchange):
                self._count(claim.key, claim.window, -claim.line.amount, now)

    def close_call(self, call: str) -> None:
        """The call is over: it counts against no concurrency limit any more."""
        with self._lock:
            for name, members in list(self._members.items()):
                members.discard(call)
                if not members:
                    del self._members[name]

    def fill_times(self, exchange: str) -> dict[str, int]:
        """How long each bucket of an open exchange takes to let go of all it can hold, ms."""
        with self._lock:
            claims = self._open.get(exchange, ())
        return {
            claim.line.balance: claim.window.end - claim.window.start
            for claim in claims
            if claim.line.kind is Kind.BUCKET
        }

    def _give_back(self, exchange: str, now: int) -> None:
        for claim in self._close(exchange):
            if not claim.line.spent:
                self._count(claim.key, claim.window, -claim.line.amount, now)

    def _close(self, exchange: str) -> tuple[_Claim, ...]:
        claims = self._open.pop(exchange, ())
        for claim in claims:
            if not claim.line.spent:
                self._held[claim.key] -= claim.line.amount
                if not self._held[claim.key]:
                    del self._held[claim.key]
        return claims

    def _count(self, key: str, window: Window, amount: int, now: int) -> None:
        if now >= window.end:
            return  # its counter is over, and may be gone: it would stand again, and stay for good
        if amount < 0:
            self._storage().decr(key, -amount)
        else:
            self._storage().incr(key, (window.end - now) / 1000 + _SLACK_SECONDS, amount)

    def _storage(self) -> MemoryStorage:
        if self._counters is None:
            from limits.storage import MemoryStorage  # it starts a thread, and most processes never need it

            self._counters = MemoryStorage()
        return self._counters


def _window(demand: Demand, now: int) -> Window:
    if demand.kind is Kind.CALENDAR:
        return next((window for window in demand.windows if window.start <= now < window.end), demand.windows[0])
    if demand.kind is Kind.BUCKET and demand.rate:
        fill = max(1, -(-demand.ceiling * demand.period * demand.tick // demand.rate))
        return Window(now // fill * fill, (now // fill + 1) * fill)
    return Window(0, FOREVER)


def _fit(offer: Offer, places: Sequence[_Place], freed: Counter[str], at_least: int) -> tuple[int, tuple[int, ...]]:
    """The largest output cap that every balance can bear, and the demands that cannot even bear the least."""
    cap = offer.cap
    short: list[int] = []
    for index, place in enumerate(places):
        demand = place.demand
        room = demand.ceiling - place.count + freed[place.key]
        if place.inside or demand.fixed + demand.per_output * cap <= room:
            continue
        bearable = (room - demand.fixed) // demand.per_output if demand.per_output else -1
        if bearable < at_least:
            short.append(index)
        else:
            cap = bearable
    return cap, tuple(short)

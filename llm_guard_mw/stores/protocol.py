"""What a store has to do, and the values that go in and out.

A store keeps balances, holds, tombstones and the journal, and changes them in atomic steps. It decides by its
own clock. The rules are those of docs/explanation/accounting.md:

Rule 1. A reserve takes all lines of one offer, or nothing. A refusal leaves no trace.
Rule 2. Every hold ends once: settled, released, taken over, or expired. Each ending but the last of those
        leaves a tombstone, so that a repeated message is known and changes nothing.
        A caller that did not hear of an ending may ask again only while the tombstone stands.
Rule 3. What moves money also appends the journal entry that says so, in the same step.
Rule 4. A settlement out of a spool names its place there. The store keeps how far each spool has been replayed, and
        moves that mark in the step that settles: however often and however late it is sent again, it counts once.

Every operation is idempotent by exchange id, so a caller that lost the reply may ask again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Protocol

import msgspec

from llm_guard_mw.model import EntryKind, JournalEntry, Kind, Line, Offer

#: How long the endings are remembered.
TOMBSTONE_MS = 5 * 60_000
ABANDONED_TOMBSTONE_MS = 60 * 60_000
#: A settle that comes later than this after its lease end moves nothing.
LATE_SETTLE_MS = 60 * 60_000
#: A hold may be this much past its lease before `verify` calls it a finding.
GRACE_MS = 1000
#: Entries that somebody took and did not drop for so long are given to another one: a batch takes tens of ms, so its
#: process is dead or its ledger stands still. If it was neither, both commit, and the ledger counts each entry once.
LEFT_ALONE_MS = 3000


# ---------------------------------------------------------------- what goes in


class Reserve(msgspec.Struct, frozen=True, gc=False):
    """A wish: grant the first of `offers` that fits, for exchange `exchange` of call `call`.

    `takes` names an exchange whose money and token lines are left out of the check, as if they were gone; when
    the wish is granted they are, and its requests line moves to this one. `force` grants the first offer
    whatever the balances say (observe mode). `draft` is what the journal says if nobody ever settles:
    `journal.encode_draft`.
    """

    exchange: str
    call: str
    offers: tuple[Offer, ...]
    lease_ms: int
    draft: bytes
    takes: str | None = None
    not_after: int | None = None  # ms, the store's clock: applied later, it is refused
    force: bool = False


class Moved(msgspec.Struct, frozen=True, gc=False):
    """One line of a settlement: what was held there, and what it really was."""

    line: Line  # line.amount is what was held (0 in a booking without a hold)
    actual: int


class Replay(msgspec.Struct, frozen=True, gc=False):
    """A place in a spool: each one there is, in order, is settled or passed over once. Positions begin at 1."""

    source: str
    position: int


class Settlement(msgspec.Struct, frozen=True, gc=False):
    """The end of an exchange. `kind` is SETTLE or RELEASE; the store may make it a CORRECTION or an ORPHAN.

    `payload` is what the journal keeps: `journal.encode_event`. `fresh` books what never had a hold (usage
    that was only heard of after the fact). A RELEASE without `moved` gives back whatever is held, if anything
    is: for a caller that went away before it learnt what was granted. (A `fresh` one has nothing to give back.)
    """

    exchange: str
    call: str
    kind: EntryKind
    lease_end: int
    moved: tuple[Moved, ...]
    payload: bytes
    fresh: bool = False
    replay: Replay | None = None


# ---------------------------------------------------------------- what comes out


class Standing(msgspec.Struct, frozen=True, gc=False):
    """How one balance of the granted or refused offer stands, in the order of its demands."""

    spent: int  # bucket: drained to now
    held: int
    rem: int = 0
    window_start: int = 0
    window_end: int | None = None  # ms; None where nothing resets


class Granted(msgspec.Struct, frozen=True, gc=False):
    """`offers[offer]` was granted with output cap `cap`. `lines` are what is now held (or spent, for requests).

    `standings` are after the grant. `short` are the demands that stood in the way of a forced grant. `took` says
    that the exchange named by `takes` was still open and has been taken over by this one.
    """

    offer: int
    cap: int
    lines: tuple[Line, ...]
    standings: tuple[Standing, ...]
    lease_end: int
    at: int
    short: tuple[int, ...] = ()
    took: bool = False


class Refused(msgspec.Struct, frozen=True, gc=False):
    """No offer fitted. `standings[i]` and `short[i]` belong to `offers[i]`; `short` are indices of its demands."""

    standings: tuple[tuple[Standing, ...], ...]
    short: tuple[tuple[int, ...], ...]
    at: int


class ClockApart(msgspec.Struct, frozen=True, gc=False):
    """None of the windows sent contains the store's time `at`: ask again with windows around it."""

    at: int


class TooLate(msgspec.Struct, frozen=True, gc=False):
    """The reserve arrived after its `not_after`, or its exchange has ended already. Nothing was done."""

    at: int


class Settled(StrEnum):
    """What a settlement did."""

    DONE = "done"
    AGAIN = "again"  # it had been done before: nothing moved
    CORRECTED = "corrected"  # the hold had been abandoned and booked: the difference was
    ORPHAN = "orphan"  # neither hold nor tombstone: booked in full
    TOO_LATE = "too_late"  # more than an hour past its lease: nothing moved


class Renewed(msgspec.Struct, frozen=True, gc=False):
    """The leases now end at `lease_end`; the exchanges in `gone` are no longer held."""

    lease_end: int
    gone: tuple[str, ...] = ()


class BalanceState(msgspec.Struct, frozen=True, gc=False):
    """One balance as it stands; concurrency is not one.

    `changes` grows with every movement, so that `verify` can tell a quiet one.
    """

    balance: str
    kind: Kind
    window_start: int
    spent: int  # a bucket's `used`, as of its stamp
    held: int
    changes: int
    rem: int = 0  # buckets: see arithmetic.drain
    stamp: int = 0  # ms


class HoldState(msgspec.Struct, frozen=True, gc=False):
    """One open hold."""

    exchange: str
    call: str
    lease_end: int
    lines: tuple[Line, ...]


class Unreadable(msgspec.Struct, frozen=True, gc=False):
    """A journal entry whose payload cannot be read: the drain puts it aside, with what it moved."""

    id: str
    kind: EntryKind
    at: int
    lines: tuple[Line, ...]
    payload: bytes
    error: str
    position: str = ""
    partition: str = ""


Done = Callable[[BaseException | None], None]
Entries = Sequence[JournalEntry | Unreadable]


class Store(Protocol):
    """The sync face. The async face has the same methods as coroutines."""

    def reserve(self, wish: Reserve) -> Granted | Refused | ClockApart | TooLate: ...

    def settle(self, settlement: Settlement) -> Settled: ...

    def replayed(self, source: str) -> int:
        """Up to which position the spool `source` has been settled here; 0: nothing of it."""

    def end_replay(self, source: str) -> None:
        """The spool is gone, and will never be asked about again."""

    def renew(self, exchanges: Sequence[str], calls: Sequence[str], lease_ms: int) -> Renewed:
        """Prolong the leases of open holds and of open calls."""

    def expire(self, most: int = 1000) -> int:
        """Book the holds whose lease has run out, drop old tombstones and members. Returns how many were booked."""

    def forget(self, most: int = 1000) -> int:
        """Drop balances that no longer say anything: windows long over, buckets long empty. Returns how many."""

    def close_call(self, call: str) -> None:
        """The call is over: it counts against no concurrency limit any more."""

    def admit(self, parent: str, scope: str, value: str, day: int, most: int) -> bool:
        """Whether `value` may have a balance of its own: known since before, or one of the first `most` new today."""

    def peek(self, balances: Sequence[str]) -> Sequence[BalanceState]:
        """The named balances as they stand; an unknown one is left out."""

    # -- the journal, brought to the ledger by the drain

    def append(self, entry_id: str, payload: bytes) -> None:
        """Enter a refusal: it has no lines, and moves nothing."""

    def take_journal(self, consumer: str, count: int, idle_ms: int = LEFT_ALONE_MS) -> Entries:
        """Give `consumer` up to `count` entries to bring to the ledger, oldest first; others are given others.

        What it has in hand already comes first, then what another one left alone in its hands for `idle_ms`, then
        what nobody had yet.
        """

    def drop_journal(self, positions: Sequence[str]) -> None:
        """Forget the entries at these positions, which the ledger has committed; no matter in whose hands they are."""

    def read_journal(self, after: str, count: int) -> Entries:
        """Look at the entries behind position `after` ("" = from the start), oldest first; nobody is given them."""

    def journal_length(self) -> int: ...

    def attend(self, for_ms: int) -> None:
        """A worker is at the journal for so long: other processes leave it to that one. 0: no more."""

    def attended(self) -> bool:
        """Whether a worker is at the journal."""

    def epoch(self) -> str:
        """The identity of this store's contents: another one after it was lost and made anew."""

    # -- read by verify

    def balances(self, after: str, count: int) -> Sequence[BalanceState]:
        """A page of balances, by name, behind name `after`."""

    def holds(self, after: str, count: int) -> Sequence[HoldState]:
        """A page of open holds, by exchange id, behind `after`."""

    def now(self) -> int:
        """The store's clock, in ms."""

    def close(self) -> None: ...


class AsyncStore(Protocol):
    """The async face: what a request needs, as coroutines."""

    async def reserve(self, wish: Reserve) -> Granted | Refused | ClockApart | TooLate: ...

    async def settle(self, settlement: Settlement) -> Settled: ...

    async def close_call(self, call: str) -> None: ...

    async def admit(self, parent: str, scope: str, value: str, day: int, most: int) -> bool: ...

    async def append(self, entry_id: str, payload: bytes) -> None: ...

    async def peek(self, balances: Sequence[str]) -> Sequence[BalanceState]: ...


class ProcessStore(Store, Protocol):
    """A store as a process uses it: both faces, a clock that asks nobody, and work that nobody waits for.

    `done` is told the outcome, None or the error, on a thread of the store or on the loop it was called from.
    """

    @property
    def name(self) -> str:
        """Which account this is, the same for all processes that share it; without credentials."""

    def clock(self) -> int:
        """The store's clock in ms, as far as it is known here. Never blocks."""

    def async_face(self) -> AsyncStore: ...

    def settle_soon(self, settlement: Settlement, done: Done) -> None: ...

    def close_call_soon(self, call: str, done: Done) -> None: ...

    def append_soon(self, entry_id: str, payload: bytes, done: Done) -> None: ...

"""The ledger as others see it. Nothing of SQL is imported until the books are opened: that takes a second."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from llm_guard_mw.stores.protocol import Store

if TYPE_CHECKING:
    from llm_guard_mw.ledger.database import Database


class Ledger:
    """The books, in SQLite or Postgres. All methods are sync, and may be called from any thread.

        ledger = Ledger("sqlite:///llm_guard.db", timezone="Europe/Berlin")
        ledger.drain(store)
        ledger.report(["feature", "tag:team"], since="7d")

    `timezone` decides what a day is. The file or database is opened by the first use, and again after a fork.
    """

    def __init__(self, url: str, *, timezone: str = "UTC") -> None:
        self.url = url
        self.zone = ZoneInfo(timezone)
        self._opened: tuple[int, Database] | None = None
        self._hands: _Hands | None = None

    @property
    def database(self) -> Database:
        """The open database of this process."""
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            from llm_guard_mw.ledger.database import Database

            if opened is not None:  # a fork copied the parent's connections: they are the parent's to close
                opened[1].engine.dispose(close=False)
            opened = self._opened = os.getpid(), Database(self.url)
        return opened[1]

    def make_ready(self) -> None:
        """See to it that the tables are there; ConfigError for those that this version cannot work with."""
        self.database.make_ready()

    def migrate(self) -> str:
        """Bring the schema up to date; any number of processes may ask at once. Returns its revision."""
        return self.database.migrate()

    def drain(self, store: Store, most: int = 500) -> int | None:
        """Take down up to `most` entries of the store's journal. Returns how many; None while `verify` reads."""
        from llm_guard_mw.ledger.drain import drain

        hands = self._my_hands()
        with hands.busy:
            return drain(self.database, self.zone, store, hands.name, most)

    def drain_all(self, store: Store) -> int:
        """Take down all there is; what others have in hand is waited for. Returns how many entries were ours."""
        from llm_guard_mw.ledger.audit import drain_all

        hands = self._my_hands()
        with hands.busy:
            return drain_all(self.database, self.zone, store, hands.name)

    def _my_hands(self) -> _Hands:
        hands = self._hands
        if hands is None or hands.pid != os.getpid():
            hands = self._hands = _Hands(os.getpid(), f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")
        return hands

    def events(self, since: str | None = None, until: str | None = None) -> Iterator[dict[str, Any]]:
        """The UsageEvents by time, one dict each, `at` in RFC 3339. However many: memory stays flat."""
        from llm_guard_mw.ledger.queries import events

        return events(self.database, self._moment(since), self._moment(until))

    def report(self, by: Sequence[str], since: str | None = None, until: str | None = None) -> list[dict[str, Any]]:
        """What each group did, the dearest first; ValueError for a dimension or a moment that is none."""
        from llm_guard_mw.ledger.queries import report

        return report(self.database, self.zone, by, self._moment(since), self._moment(until))

    def prune(self, now: int, days: int) -> int:
        """Drop raw rows of all days but today (of `now`, in ms) and the last `days`. Returns how many."""
        from llm_guard_mw.ledger.queries import prune

        return prune(self.database, self.zone, now * 1000, days)

    def close(self) -> None:
        """Let go of the database. The next use opens it again."""
        opened, self._opened = self._opened, None
        if opened is not None and opened[0] == os.getpid():
            opened[1].close()

    def _moment(self, written: str | None) -> int | None:
        from llm_guard_mw.ledger.moments import parse_moment

        return None if written is None else parse_moment(written, self.zone, _now())


@dataclass(frozen=True, slots=True)
class _Hands:
    """What this process's drain is called in the journal, and that one of its threads drains at a time."""

    pid: int
    name: str
    busy: threading.Lock = field(default_factory=threading.Lock)


def _now() -> int:
    return time.time_ns() // 1000


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether the books add up. `findings` are dicts of `kind balance expected actual message`.

    `drift_nanos` is the sum of all differences in money, each balance by itself: 0 when the books add up.
    """

    ok: bool
    drift_nanos: int
    open_holds: int
    findings: tuple[dict[str, Any], ...]


def verify(store: Store, ledger: Ledger) -> Verification:
    """Sweep, drain, and prove the account: see docs/explanation/books.md. It runs beside live processes."""
    from llm_guard_mw.ledger.audit import audit

    found = audit(ledger.database, store, lambda: ledger.drain_all(store))
    return Verification(
        ok=not found.findings,
        drift_nanos=sum(finding.nanos for finding in found.findings),
        open_holds=found.open_holds,
        findings=tuple(
            {
                "kind": finding.kind,
                "balance": finding.balance,
                "expected": finding.expected,
                "actual": finding.actual,
                "message": finding.message,
            }
            for finding in found.findings
        ),
    )

"""Guarding alone: what a process does while the store is away and `on_store_failure` says "allow".

The limits hold by its own count (`local_cap`), and what is used is written down (`spool`) until the store answers
again and takes it. A grant made here is like one of the store's to everybody but those who close it.

Rule 1. Nothing is granted that could not be booked: without room in the spool the call is refused as under "deny".
Rule 2. What was granted here is settled out of the spool and never directly, so that it cannot be settled twice.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from llm_guard_mw import spool_records as records
from llm_guard_mw.errors import StoreUnavailable
from llm_guard_mw.local_cap import LocalCap
from llm_guard_mw.logs import log
from llm_guard_mw.model import Kind, Line
from llm_guard_mw.settlement import Closing
from llm_guard_mw.spool import Spool
from llm_guard_mw.stores.protocol import Granted, Moved, Refused, Reserve


class Alone:
    """One a process; safe to use from many threads."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.cap = LocalCap()
        self._told = False

    def reserve(self, wish: Reserve, why: StoreUnavailable) -> Granted | Refused:
        """What the store would answer. StoreUnavailable if what is used could not be counted, or not be booked."""
        now = self.spool.store.clock()
        outcome = self.cap.reserve(wish, now)
        if isinstance(outcome, Refused):
            return outcome
        fill_times = self.cap.fill_times(wish.exchange)
        try:
            self.spool.begin(
                records.begun(wish, outcome, lambda line: now + fill_times[line.balance] if _drains(line) else 0)
            )
        except StoreUnavailable:
            self.cap.forget(wish.exchange, now)
            raise
        if not self._told:
            self._told = True
            log.warning("guarding_alone", reason=str(why))
        return outcome

    def close(self, closing: Closing) -> None:
        """The end of an exchange that was granted here."""
        now = self.spool.store.clock()
        exchange = closing.settlement.exchange
        fill_times = self.cap.fill_times(exchange)
        moved = tuple(Moved(replace(each.line, amount=0), each.actual) for each in closing.settlement.moved)
        self.cap.settle(exchange, moved, now)
        self.spool.end(
            records.ended(
                replace(closing.settlement, fresh=True, moved=moved),
                lambda line: now + fill_times.get(line.balance, 0) if _drains(line) else 0,
            )
        )

    def note_refusal(self, entry_id: str, payload: bytes) -> bool:
        """Keep the entry of a refusal that the store did not take; False if there is no room for it."""
        return self.spool.note(records.Refused(entry_id, records.raw(payload)))

    def drop(self, exchange: str) -> None:
        """Another exchange stands in its place: nothing of this one is booked."""
        self.cap.forget(exchange, self.spool.store.clock())
        self.spool.end(records.Dropped(exchange))

    def close_call(self, call: str) -> None:
        """The call is over: it counts against no concurrency limit any more."""
        self.cap.close_call(call)

    def keep(self, outbox: Sequence[Closing]) -> None:
        """At the end of the process: settlements that the store did not take go to the process that comes next."""
        try:
            for closing in outbox:
                self.spool.end(records.ended(closing.settlement, lambda _line: 0))
        except OSError as error:
            log.error("settlements_lost", settlements=len(outbox), reason=str(error))
        else:
            if outbox:
                log.warning("spooled_at_exit", settlements=len(outbox))

    def replay(self, seconds: float) -> None:
        """Settle what waits, for about so long. StoreUnavailable while the store is away."""
        self.spool.replay(seconds)
        if self.spool.is_empty:
            self._told = False


def _drains(line: Line) -> bool:
    return line.kind is Kind.BUCKET

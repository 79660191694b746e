"""The keeper: what a process with a guard does in the background, on one daemon thread.

    renew     the leases of all holds and calls this process has open, every third of the lease, in one batch
    sweep     book the holds whose owners are gone, every half lease
    drain     move journal entries into the ledger, within a second when there is room
    retry     settlements that the store did not take
    prune     what has had its time, in store and ledger, now and then

Under load the drain yields: after a full batch it rests several times as long as the batch took. The ledger (and
with it SQLAlchemy, a second of imports) is first touched when there is something to drain.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from llm_guard_mw.desk import Desk
from llm_guard_mw.errors import GuardError
from llm_guard_mw.estimate import load_vocabularies
from llm_guard_mw.ledger import Ledger
from llm_guard_mw.logs import log
from llm_guard_mw.stores.protocol import Settled

TICK_SECONDS = 0.25
#: Small, since the ledger may share the store's file: 100 entries lock it for about 10 ms.
DRAIN_BATCH = 100
DRAIN_TURN_SECONDS = 1.0
#: Under load the drain rests so many times as long as a batch took: its thread and the requests share one interpreter.
DRAIN_REST = 4
PRUNE_SECONDS = 3600.0

#: After a failed drain the ledger is left alone for this long, doubled at each further failure.
LEDGER_REST_SECONDS = 1.0
LEDGER_REST_MAX_SECONDS = 30.0

#: How long a fork waits for the duty at hand; the longest ones import a library or write a batch.
FORK_WAIT_SECONDS = 5.0


@dataclass(slots=True)
class _Duty:
    """Something done every so often; a failure is logged and does not keep the others from being done."""

    name: str
    every: float
    work: Callable[[], None]
    due: float = 0.0


class Keeper:
    """Started by the first call of a process, and again in a forked child; `stop` does what waits and ends it."""

    def __init__(self, desk: Desk, ledger: Ledger, *, retention_days: int) -> None:
        self.desk = desk
        self.ledger = ledger
        self.retention_days = retention_days
        lease = desk.policy.lease_seconds
        self.duties = [
            _Duty("retry", TICK_SECONDS, self._retry),
            _Duty("renew", lease / 3, self._renew),
            _Duty("sweep", lease / 2, self._sweep),
            _Duty("refusals", 1.0, desk.flush_refusals),
            _Duty("drain", TICK_SECONDS, self._drain),
            _Duty("prune", PRUNE_SECONDS, self._prune),
        ]
        self._failures = 0
        self.restart()

    def restart(self) -> None:
        """As new: after a fork no thread came along."""
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._stopping = threading.Event()
        self._busy = threading.Lock()
        now = time.monotonic()
        for duty in self.duties:
            duty.due = now + (duty.every if duty.every > 1 else 0)

    def start(self) -> None:
        """Make sure the thread runs. Cheap when it does."""
        if self._thread is not None:
            return
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="llm-guard-keeper", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """End the thread; what waits for the store or the ledger is brought there first, if they answer."""
        with self._starting:
            thread, self._thread = self._thread, None
            if thread is None:
                return
            self._stopping.set()
            thread.join()
            self._stopping.clear()

    def pause(self) -> bool:
        """Wait until the thread is between two duties, and keep it there; whoever got True calls `resume`.

        A fork copies locks as they are held. Those that a duty holds (of an import, of a table that is being read)
        would never open again in the child, whose own keeper would stand still before the first of them.
        """
        return self._busy.acquire(timeout=FORK_WAIT_SECONDS)

    def resume(self) -> None:
        self._busy.release()

    def _run(self) -> None:
        with self._busy:
            self._warm_up()
        while not self._stopping.wait(TICK_SECONDS):
            now = time.monotonic()
            for duty in self.duties:
                if now >= duty.due:
                    self._do(duty)
        for duty in self.duties:
            if duty.name in ("retry", "refusals", "drain"):
                self._do(duty)

    def _warm_up(self) -> None:
        """Read tables that the first request would otherwise wait for."""
        try:
            self.desk.prices.warm()
            load_vocabularies()
            self.desk.identifier.warm()
        except Exception:
            log.exception("keeper_failed", duty="warm_up")

    def _do(self, duty: _Duty) -> None:
        duty.due = time.monotonic() + duty.every
        try:
            with self._busy:
                duty.work()
        except GuardError as error:
            log.warning("keeper_waits", duty=duty.name, reason=str(error))
        except Exception:
            log.exception("keeper_failed", duty=duty.name)

    # ------------------------------------------------------------ the duties

    def _renew(self) -> None:
        desk = self.desk
        exchanges, calls = list(desk.open), [call.id for call in list(desk.calls.values()) if call.joined]
        if not exchanges and not calls:
            return
        renewed = desk.store.renew(exchanges, calls, desk.policy.lease_seconds * 1000)
        gone = set(renewed.gone)
        for name in exchanges:
            exchange = desk.open.get(name)
            if exchange is None:
                continue
            if name in gone:  # booked by a sweep while this process was paused: its settle will be a correction
                desk.open.pop(name, None)
                if not exchange.closed:  # else its settlement has just gone through
                    log.warning("lease_lost", call_id=exchange.call.id, attempt=exchange.number)
            else:
                exchange.lease_end = renewed.lease_end

    def _sweep(self) -> None:
        booked = self.desk.store.expire()
        if booked:
            log.warning("abandoned", exchanges=booked)

    def _retry(self) -> None:
        outbox = self.desk.outbox
        for _ in range(len(outbox)):
            closing = outbox.popleft()
            try:
                outcome = self.desk.store.settle(closing.settlement)
            except GuardError:
                outbox.appendleft(closing)
                raise
            if outcome is Settled.TOO_LATE:
                log.error("settle_too_late", call_id=closing.event.call_id, attempt=closing.event.attempt)

    def _drain(self) -> None:
        if not self.desk.store.journal_length():
            return
        try:
            began = started = time.monotonic()
            while self.ledger.drain(self.desk.store, DRAIN_BATCH) == DRAIN_BATCH and not self._stopping.is_set():
                # A long journal must not keep leases from being renewed: the rest of it is for the next turn.
                if time.monotonic() - began > DRAIN_TURN_SECONDS:
                    break
                if self._stopping.wait(DRAIN_REST * (time.monotonic() - started)):
                    break
                started = time.monotonic()
            self._failures = 0
        except Exception as error:
            self._failures += 1
            rest = min(LEDGER_REST_SECONDS * 2 ** (self._failures - 1), LEDGER_REST_MAX_SECONDS)
            next(duty for duty in self.duties if duty.name == "drain").due = time.monotonic() + rest
            log.warning("ledger_away", reason=f"{type(error).__name__}: {error}", rest_seconds=rest)

    def _prune(self) -> None:
        forgotten = self.desk.store.forget()
        pruned = self.ledger.prune(self.desk.store.now(), self.retention_days)
        if forgotten or pruned:
            log.info("pruned", balances=forgotten, rows=pruned)

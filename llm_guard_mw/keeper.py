"""The keeper: what a process with a guard does in the background, on one daemon thread.

    renew     the leases of all holds and calls this process has open, every third of the lease, in one batch
    sweep     book the holds whose owners are gone, every half lease
    drain     move journal entries into the ledger, within a second when there is room; left to a worker that lives
    retry     settlements that the store did not take, and the closing of calls whose answer was dropped unclosed
    replay    what was granted while the store was away, by this process or by one that is gone
    prune     what has had its time, in store and ledger, now and then; likewise

Under load the drain yields: it takes what the requests leave of the interpreter (`duties.Room`). The ledger (and with
it SQLAlchemy, a second of imports) is first touched when there is something to drain.
"""

from __future__ import annotations

import sys
import threading
import time

from llm_guard_mw.desk import Desk
from llm_guard_mw.duties import PRUNE_SECONDS, Duty, Patience, Room, prune, sweep
from llm_guard_mw.errors import ConfigError, GuardError, StoreUnavailable
from llm_guard_mw.estimate import load_vocabularies
from llm_guard_mw.ledger import Ledger
from llm_guard_mw.logs import log
from llm_guard_mw.stores.protocol import Settled

TICK_SECONDS = 0.25
#: A long spool must not keep leases from being renewed: the rest of it is for the next turn.
REPLAY_TURN_SECONDS = 1.0
#: Small, since the ledger may share the store's file: 100 entries lock it for some milliseconds.
DRAIN_BATCH = 100
DRAIN_TURN_SECONDS = 1.0
#: With the journal this full a worker is not alone with it any more.
HELP_AT = 0.5

#: How long a fork waits for the duty at hand; the longest ones import a library or write a batch.
FORK_WAIT_SECONDS = 5.0


class Keeper:
    """Started by the first call of a process, and again in a forked child; `stop` does what waits and ends it."""

    def __init__(self, desk: Desk, ledger: Ledger, *, retention_days: int) -> None:
        self.desk = desk
        self.ledger = ledger
        self.retention_days = retention_days
        lease = desk.policy.lease_seconds
        self.duties = [
            Duty("retry", TICK_SECONDS, self._retry),
            Duty("replay", TICK_SECONDS, self._replay),
            Duty("spool", 1.0, desk.spool.sync),
            Duty("renew", lease / 3, self._renew),
            Duty("sweep", lease / 2, self._sweep),
            Duty("refusals", 1.0, desk.flush_refusals),
            Duty("drain", TICK_SECONDS, self._drain),
            Duty("prune", PRUNE_SECONDS, self._prune),
        ]
        self._patience = Patience()
        self.restart()

    def restart(self) -> None:
        """As new: after a fork no thread came along."""
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._stopping = threading.Event()
        self._busy = threading.Lock()
        self._room: Room | None = None
        now = time.monotonic()
        for duty in self.duties:
            duty.due = now + (duty.every if duty.every > 1 else 0)

    def start(self) -> None:
        """Make sure the thread runs. Cheap when it does."""
        if self._thread is not None:
            return
        if type(self._starting) is not type(threading.Lock()):
            # Locks of two kinds do not wait for each other: the process would stand still, and nobody would say why.
            raise ConfigError(
                "gevent took the place of threads after llm_guard_mw was loaded, which breaks its locks: patch first,"
                ' for gunicorn --preload with "from gevent import monkey; monkey.patch_all()" in gunicorn.conf.py'
            )
        with self._starting:
            if self._thread is None:
                if _threads_are_greenlets():
                    # Before the first reserve, which would be too late once the tables are read; and out of the way of
                    # all other greenlets, which could not even hear their clients meanwhile.
                    sys.modules["gevent"].get_hub().threadpool.apply(self._read_tables)
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
            self._read_tables()
            Duty("warm", 0.0, self.desk.identifier.warm).do()
        while not self._stopping.wait(TICK_SECONDS):
            now = time.monotonic()
            for duty in self.duties:
                if now >= duty.due:
                    self._do(duty)
        for duty in self.duties:
            if duty.name in ("retry", "replay", "refusals", "drain"):
                self._do(duty)

    def _read_tables(self) -> None:
        """Read what the first request would otherwise wait for."""
        try:
            self.desk.prices.warm()
            load_vocabularies()
            if _threads_are_greenlets():
                from llm_guard_mw.ledger import drain  # noqa: F401 - with it SQLAlchemy, which stops everybody
        except Exception:
            log.exception("keeper_failed", duty="read_tables")

    def _do(self, duty: Duty) -> None:
        with self._busy:
            duty.do()

    # ------------------------------------------------------------ the duties

    def _renew(self) -> None:
        desk = self.desk
        exchanges = [name for name, exchange in list(desk.open.items()) if not exchange.alone]
        calls = [call.id for call in list(desk.calls.values()) if call.joined]
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
        sweep(self.desk.store)

    def _retry(self) -> None:
        left_behind, outbox = self.desk.left_behind, self.desk.outbox
        while left_behind:
            left_behind.popleft()()
        for _ in range(len(outbox)):
            closing = outbox.popleft()
            try:
                outcome = self.desk.store.settle(closing.settlement)
            except GuardError:
                outbox.appendleft(closing)
                raise
            if outcome is Settled.TOO_LATE:
                log.error("settle_too_late", call_id=closing.event.call_id, attempt=closing.event.attempt)

    def _replay(self) -> None:
        desk = self.desk
        if not desk.spool.is_waiting():
            return
        # What is settled is entered: like a reserve, this waits while the ledger does not take enough of it.
        try:
            if desk.store.journal_length() < desk.policy.journal_max * 9 // 10:
                desk.alone.replay(REPLAY_TURN_SECONDS)
        except StoreUnavailable:  # it was told when this process began to guard alone
            return

    def _drain(self) -> None:
        store, journal_max = self.desk.store, self.desk.policy.journal_max
        room = self._room = self._room or Room()
        room.look()
        waiting = store.journal_length()
        if not waiting or (waiting < HELP_AT * journal_max and store.attended()):
            return
        try:
            began = time.monotonic()
            while True:
                started, cpu = time.monotonic(), time.thread_time()
                drained = self.ledger.drain(store, DRAIN_BATCH) or 0
                waiting -= drained
                now = time.monotonic()
                # A long journal must not keep leases from being renewed: the rest of it is for the next turn.
                if drained < DRAIN_BATCH or now - began > DRAIN_TURN_SECONDS:
                    break
                room.look()
                if self._stopping.wait(room.rest(time.thread_time() - cpu, now - started, waiting / journal_max)):
                    break
            self._patience.worked()
        except Exception as error:
            next(duty for duty in self.duties if duty.name == "drain").due = time.monotonic() + self._patience.failed(
                error
            )

    def _prune(self) -> None:
        if not self.desk.store.attended():
            prune(self.desk.store, self.ledger, self.retention_days)


def _threads_are_greenlets() -> bool:
    """Whether gevent has taken the place of threads: then whoever computes stops all others."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))

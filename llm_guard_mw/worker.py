"""The worker: drain, sweep and prune in a process of their own, for apps that should have their CPU to themselves.

Rule 1. While a worker is alive it says so in the store, and the apps leave the journal to it. It says so for a few
        seconds only, and only while its drain works: when it dies or cannot reach the ledger, the apps take over.
Rule 2. Several workers share the journal as any processes do. One that is told to stop finishes the batch at hand.
Rule 3. A store or ledger that is away is waited for; only a configuration that cannot be right ends a worker.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from llm_guard_mw.duties import PRUNE_SECONDS, Duty, Patience, prune, sweep
from llm_guard_mw.errors import ConfigError
from llm_guard_mw.ledger import Ledger
from llm_guard_mw.logs import log
from llm_guard_mw.stores.protocol import Store

TICK_SECONDS = 0.1
BATCH = 500
ATTEND_SECONDS = 1.0
ATTEND_FOR_MS = 3000
TELL_SECONDS = 60.0


@dataclass(slots=True)
class Work:
    """What a worker has done."""

    drained: int = 0
    abandoned: int = 0
    pruned: int = 0


class Worker:
    """Runs in the foreground: `Worker(store, ledger, lease_seconds=120, retention_days=90).run(stopping)`."""

    def __init__(self, store: Store, ledger: Ledger, *, lease_seconds: float, retention_days: int) -> None:
        self.store = store
        self.ledger = ledger
        self.retention_days = retention_days
        self.work = Work()
        self.patience = Patience()
        self.duties = [
            Duty("attend", ATTEND_SECONDS, self._attend),
            Duty("sweep", lease_seconds / 2, self._sweep),
            Duty("prune", PRUNE_SECONDS, self._prune),
            Duty("tell", TELL_SECONDS, self._tell),
        ]
        self._told = 0
        self._rests_until = 0.0

    def run(self, stopping: threading.Event) -> Work:
        """Work until `stopping` is set; ConfigError if that can never succeed."""
        log.info("worker_started")
        self._look_over()
        try:
            while not stopping.is_set():
                for duty in self.duties:
                    if time.monotonic() >= duty.due:
                        duty.do()
                if not self._drain():
                    stopping.wait(TICK_SECONDS)
        finally:
            Duty("attend", 0, lambda: self.store.attend(0)).do()
            log.info("worker_stopped", drained=self.work.drained)
        return self.work

    def _look_over(self) -> None:
        """A configuration that cannot be right says so at once, and not when there is something to drain."""
        for look in (self.store.epoch, self.ledger.make_ready):
            try:
                look()
            except ConfigError:
                raise
            except Exception as error:
                log.warning("keeper_waits", duty="start", reason=f"{type(error).__name__}: {error}")

    def _drain(self) -> int:
        """One batch. Returns how many entries it had; 0 also while the ledger is left alone."""
        if time.monotonic() < self._rests_until:
            return 0
        try:
            drained = self.ledger.drain(self.store, BATCH) or 0
        except ConfigError:
            raise
        except Exception as error:
            self._rests_until = time.monotonic() + self.patience.failed(error)
            return 0
        self.patience.worked()
        self.work.drained += drained
        return drained

    def _attend(self) -> None:
        if not self.patience.failures:
            self.store.attend(ATTEND_FOR_MS)

    def _sweep(self) -> None:
        self.work.abandoned += sweep(self.store)

    def _prune(self) -> None:
        self.work.pruned += prune(self.store, self.ledger, self.retention_days)

    def _tell(self) -> None:
        if self.work.drained > self._told:
            log.info("drained", entries=self.work.drained - self._told, waiting=self.store.journal_length())
            self._told = self.work.drained

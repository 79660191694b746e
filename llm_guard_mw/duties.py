"""Duties: what is done every so often in the background, by each guarded process (`keeper`) or by a `worker`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

from llm_guard_mw.errors import GuardError
from llm_guard_mw.ledger import Ledger
from llm_guard_mw.logs import log
from llm_guard_mw.stores.protocol import Store

PRUNE_SECONDS = 3600.0

#: After a failed drain the ledger is left alone for this long, doubled at each further failure.
LEDGER_REST_SECONDS = 1.0
LEDGER_REST_MAX_SECONDS = 30.0


@dataclass(slots=True)
class Duty:
    """Something done every so often; a failure is logged and does not keep the others from being done."""

    name: str
    every: float
    work: Callable[[], None]
    due: float = 0.0

    def do(self) -> None:
        self.due = time.monotonic() + self.every
        try:
            self.work()
        except GuardError as error:
            log.warning("keeper_waits", duty=self.name, reason=str(error))
        except Exception:
            log.exception("keeper_failed", duty=self.name)


@dataclass(slots=True)
class Patience:
    """How long a ledger that failed is left alone."""

    failures: int = 0

    def failed(self, error: Exception) -> float:
        """Returns the seconds."""
        self.failures += 1
        rest = min(LEDGER_REST_SECONDS * 2.0 ** (self.failures - 1), LEDGER_REST_MAX_SECONDS)
        log.warning("ledger_away", reason=f"{type(error).__name__}: {error}", rest_seconds=rest)
        return rest

    def worked(self) -> None:
        self.failures = 0


def sweep(store: Store) -> int:
    """Book the holds whose owners are gone. Returns how many."""
    booked = store.expire()
    if booked:
        log.warning("abandoned", exchanges=booked)
    return booked


def prune(store: Store, ledger: Ledger, retention_days: int) -> int:
    """Drop what has had its time, in store and ledger. Returns how many rows."""
    forgotten = store.forget()
    pruned = ledger.prune(store.now(), retention_days)
    if forgotten or pruned:
        log.info("pruned", balances=forgotten, rows=pruned)
    return pruned


# ---------------------------------------------------------------- how fast to drain beside requests

#: Of one core, while requests take all of it.
SHARE_MIN = 0.05
#: And while nothing else is done: a request that comes just then finds the interpreter free every other moment.
SHARE_MAX = 0.5
#: Over so long is looked at what others did; less is noise.
_LOOK_SECONDS = 0.1


class Room:
    """How much of the interpreter the drain may take, whose thread shares it with the requests.

    It gets what they left free of one core since the last look, and never less than a twentieth. As the journal
    fills, its part grows with the square root of that: a tenth of a core at a hundredth of `journal_max`, a half at a
    quarter. So a burst is written down when it is over, and what goes on for long is paid for while it goes on.
    `clocks` gives the seconds of a clock, of the process' CPU, and of this thread's.
    """

    def __init__(self, clocks: Callable[[], tuple[float, float, float]] | None = None) -> None:
        self.busy = 0.0  # the part of a core that other threads took
        self._clocks = clocks or _clocks
        self._since = self._clocks()

    def look(self) -> None:
        """See what other threads did. By the thread that drains, between its batches."""
        now = self._clocks()
        wall, process, own = (new - old for new, old in zip(now, self._since, strict=True))
        if wall >= _LOOK_SECONDS:
            self.busy = min(1.0, max(0.0, (process - own) / wall))
            self._since = now

    def share(self, fullness: float) -> float:
        """The part of a core, with the journal filled to `fullness` (0 to 1)."""
        return min(1.0, max(SHARE_MIN, min(SHARE_MAX, 1.0 - self.busy), sqrt(max(0.0, fullness))))

    def rest(self, cpu: float, wall: float, fullness: float) -> float:
        """How many seconds to rest after a batch that took `cpu` seconds of `wall`."""
        return max(0.0, cpu / self.share(fullness) - wall)


def _clocks() -> tuple[float, float, float]:
    return time.monotonic(), time.process_time(), time.thread_time()

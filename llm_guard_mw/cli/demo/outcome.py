"""What came of the demo: the answers, our books, and beside them what the provider itself says it has served.

The provider's list is priced here anew, with genai-prices alone, so that nothing of ours vouches for itself.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import Any

from llm_guard_mw.cli.demo.crowd import Answer, asks, drive
from llm_guard_mw.cli.demo.stage import HOST, Stage, set_up
from llm_guard_mw.cli.demo.standin import Row
from llm_guard_mw.config import load_config
from llm_guard_mw.ledger import Ledger, Verification, verify
from llm_guard_mw.stores import open_store

#: Who serves what, as genai-prices calls them.
_PROVIDERS = {"openai": "openai", "anthropic": "anthropic", "gemini": "google"}

_NOT_SPENT = frozenset({"refused", "release"})


@dataclass(slots=True)
class Sold:
    """What was sold of one model, as somebody's list has it."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cost_nanos: int = 0

    def add(self, input_tokens: int, output_tokens: int, cached_tokens: int, cost_nanos: int) -> None:
        self.requests += 1
        self.input_tokens += input_tokens
        self.output_tokens += output_tokens
        self.cached_tokens += cached_tokens
        self.cost_nanos += cost_nanos


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that there is to show."""

    calls: int
    seconds: float
    answers: tuple[Answer, ...]
    spent: list[dict[str, Any]]  # Ledger.report
    provider: Mapping[str, Sold]
    books: Mapping[str, Sold]
    verification: Verification
    statuses: Counter[int] = field(default_factory=Counter)

    @property
    def equal(self) -> bool:
        """Whether the provider's list and our books say the same, to the token and the nano-dollar."""
        return self.provider == self.books

    @property
    def strange(self) -> dict[int, int]:
        """Answers that are neither an answer nor a refusal, by status."""
        return {status: count for status, count in self.statuses.items() if status not in (200, 429)}

    @property
    def complete(self) -> bool:
        """Whether each request was answered or refused, and each answer is one exchange in the books."""
        exchanges = sum(sold.requests for sold in self.books.values())
        return sum(self.statuses.values()) == self.calls and not self.strange and exchanges == self.statuses[200]

    @property
    def good(self) -> bool:
        return self.equal and self.complete and self.verification.ok

    def refusals(self) -> list[dict[str, Any]]:
        """Who was refused by which limit, the most refused first."""
        groups: dict[tuple[str, ...], int] = Counter()
        waits: dict[tuple[str, ...], int | None] = {}
        for answer in self.answers:
            if answer.status != 429:
                continue
            problem = answer.problem()
            name = (answer.person.tenant, answer.person.user, answer.feature, problem["limit"], problem["code"])
            groups[name] += 1
            waits[name] = max(waits.get(name) or 0, answer.retry_after() or 0) or None
        columns = ("tenant", "user", "feature", "limit", "code")
        return [
            {**dict(zip(columns, name, strict=True)), "times": times, "retry_after": waits[name]}
            for name, times in sorted(groups.items(), key=lambda group: (-group[1], group[0]))
        ]

    def sample(self) -> Answer | None:
        """One refusal to look at: of a budget that is spent until its reset, if there is one."""
        refused = [answer for answer in self.answers if answer.status == 429]
        return max(refused, key=lambda answer: answer.retry_after() or 0, default=None)


def play(calls: int, seed: int, keep: Path | None = None) -> Outcome:
    """Set up, let everybody call, end the app, and read the books."""
    with set_up(keep) as stage:
        started = time.monotonic()
        answers = drive(HOST, stage.port, asks(calls, seed))
        seconds = time.monotonic() - started
        stage.end_app()
        return _read(stage, calls, seconds, answers)


def _read(stage: Stage, calls: int, seconds: float, answers: Sequence[Answer]) -> Outcome:
    config = load_config(stage.config, environ=stage.environ)
    ledger = Ledger(config.ledger, timezone=config.policy.timezone)
    store = open_store(config.store, journal_max=config.policy.journal_max)
    try:
        found = verify(store, ledger)
        return Outcome(
            calls=calls,
            seconds=seconds,
            answers=tuple(answers),
            spent=ledger.report(["tenant", "user", "feature", "model"]),
            provider=invoice(row for row in stage.provider.rows if row.status == 200),
            books=_books(ledger.events()),
            verification=found,
            statuses=Counter(answer.status for answer in answers),
        )
    finally:
        ledger.close()
        store.close()


def _books(events: Iterable[Mapping[str, Any]]) -> dict[str, Sold]:
    sold: dict[str, Sold] = {}
    for event in events:
        if event["kind"] not in _NOT_SPENT:
            sold.setdefault(event["model"], Sold()).add(
                event["input_tokens"] or 0,
                event["output_tokens"] or 0,
                event["cached_input_tokens"] or 0,
                event["cost_nanos"] or 0,
            )
    return sold


def invoice(rows: Iterable[Row]) -> dict[str, Sold]:
    """The provider's list, each request at its list price."""
    sold: dict[str, Sold] = {}
    for row in rows:
        sold.setdefault(row.model, Sold()).add(row.input_tokens, row.output_tokens, row.cached_tokens, _list_price(row))
    return sold


def _list_price(row: Row) -> int:
    from genai_prices import Usage, calc_price

    usage = Usage(
        input_tokens=row.input_tokens,
        cache_read_tokens=row.cached_tokens,
        cache_write_tokens=row.cache_write_tokens,
        output_tokens=row.output_tokens,
    )
    price = calc_price(usage, row.model, provider_id=_PROVIDERS[row.api.partition(".")[0]])
    return int((price.total_price * 10**9).quantize(Decimal(1), rounding=ROUND_HALF_EVEN))


def as_record(outcome: Outcome) -> dict[str, Any]:
    """The outcome for programs."""
    sample = outcome.sample()
    found = outcome.verification
    return {
        "ok": outcome.good,
        "calls": outcome.calls,
        "answered": outcome.statuses[200],
        "refused": outcome.statuses[429],
        "seconds": round(outcome.seconds, 3),
        "spent": outcome.spent,
        "refusals": outcome.refusals(),
        "sample": None if sample is None else {"headers": dict(sample.headers), "body": sample.problem()},
        "provider_nanos": total_nanos(outcome.provider),
        "books_nanos": total_nanos(outcome.books),
        "verify": {"ok": found.ok, "drift_nanos": found.drift_nanos, "open_holds": found.open_holds},
    }


def total_nanos(sold: Mapping[str, Sold]) -> int:
    return sum(each.cost_nanos for each in sold.values())

"""The tables of the books, one SQLModel class each.

Rule 1. Times are BIGINT microseconds (or milliseconds, where the account says so) since the epoch, UTC. SQLite has
        no time type and Postgres' goes through a driver's idea of time zones; an integer is the same in both,
        sorts by itself, and is what the journal says. Queries turn it into RFC 3339 at the edge.
Rule 2. Money and amounts are BIGINT. NULL means that nobody said, and is never 0.
Rule 3. Names do not meet those of the SQLite store, which may live in the same file.

The migrations in `migrations/` make these tables; a test compares the two.
"""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy import JSON, BigInteger, Index, Integer, MetaData, Table, Text, UniqueConstraint
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import registry
from sqlmodel import Field, SQLModel

#: An app that uses SQLModel itself must not find our tables among its own, so we keep a registry apart.
METADATA = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s",
    }
)

#: SQLite gives out row numbers only for a column of type INTEGER, which is 64 bits wide there.
RowNumber = BigInteger().with_variant(Integer(), "sqlite")
Json = JSON().with_variant(JSONB(), "postgresql")


class _Row(SQLModel, registry=registry(metadata=METADATA)):
    """The base of all rows."""


class UsageEventRow(_Row, table=True):
    """One journal entry: all of its UsageEvent, its lines, and where it stands in the rollup."""

    __tablename__ = "usage_events"
    __table_args__ = (
        UniqueConstraint("call_id", "attempt", "kind", "price_version"),
        Index("ix_usage_events_at", "at", "number"),
        Index("ix_usage_events_rollup", "rollup"),
    )

    number: int | None = Field(default=None, primary_key=True, sa_type=RowNumber)  # order of arrival
    call_id: str = Field(sa_type=Text)
    attempt: int
    kind: str = Field(sa_type=Text)
    at: int = Field(sa_type=BigInteger)  # µs
    request_id: str | None = Field(default=None, sa_type=Text)
    parent_call_id: str | None = Field(default=None, sa_type=Text)
    tenant: str | None = Field(default=None, sa_type=Text)
    user: str | None = Field(default=None, sa_type=Text)
    tier: str | None = Field(default=None, sa_type=Text)
    key_id: str | None = Field(default=None, sa_type=Text)
    feature: str | None = Field(default=None, sa_type=Text)
    route: str | None = Field(default=None, sa_type=Text)
    workflow_id: str | None = Field(default=None, sa_type=Text)
    session_id: str | None = Field(default=None, sa_type=Text)
    experiment: str | None = Field(default=None, sa_type=Text)
    variant: str | None = Field(default=None, sa_type=Text)
    tags: dict[str, str] = Field(default_factory=dict, sa_type=Json)
    provider: str | None = Field(default=None, sa_type=Text)
    api: str | None = Field(default=None, sa_type=Text)
    requested_model: str | None = Field(default=None, sa_type=Text)
    model: str | None = Field(default=None, sa_type=Text)
    input_tokens: int | None = Field(default=None, sa_type=BigInteger)
    cached_input_tokens: int | None = Field(default=None, sa_type=BigInteger)
    cache_write_tokens: int | None = Field(default=None, sa_type=BigInteger)
    output_tokens: int | None = Field(default=None, sa_type=BigInteger)
    reasoning_tokens: int | None = Field(default=None, sa_type=BigInteger)
    audio_input_tokens: int | None = Field(default=None, sa_type=BigInteger)
    audio_output_tokens: int | None = Field(default=None, sa_type=BigInteger)
    estimated_input_tokens: int | None = Field(default=None, sa_type=BigInteger)
    estimated_output_tokens: int | None = Field(default=None, sa_type=BigInteger)
    credits: int | None = Field(default=None, sa_type=BigInteger)
    cost_nanos: int | None = Field(default=None, sa_type=BigInteger)
    saved_nanos: int | None = Field(default=None, sa_type=BigInteger)
    price_version: str = Field(default="", sa_type=Text)
    basis: str | None = Field(default=None, sa_type=Text)
    exact: bool = False
    duration_ms: int | None = Field(default=None, sa_type=BigInteger)
    first_token_ms: int | None = Field(default=None, sa_type=BigInteger)
    status: int | None = None
    success: bool | None = None
    error_type: str | None = Field(default=None, sa_type=Text)
    decision: str | None = Field(default=None, sa_type=Text)
    degraded: bool = False
    cache_hit: bool = False
    deduped_from: str | None = Field(default=None, sa_type=Text)
    count: int = Field(default=1, sa_type=BigInteger)  # refusals that a `refused` row stands for
    lines: list[list[Any]] = Field(default_factory=list, sa_type=Json)  # [balance, kind, unit, window, amount, spent]
    day: str = Field(sa_type=Text)  # of `at`, in the configured timezone: 2026-11-21
    rollup: str = Field(sa_type=Text)  # the DailyUsage row that counts this one


class DailyUsage(_Row, table=True):
    """What one group of equal dimensions did on one day. Kept for good.

    `calls` are the calls that touched the group: one with two models is in two groups. A sum is NULL as long
    as no row of the group knew the number.
    """

    __tablename__ = "daily_usage"
    __table_args__ = (Index("ix_daily_usage_day", "day"),)

    rollup: str = Field(primary_key=True, sa_type=Text)  # a digest of the day and the dimensions
    day: str = Field(sa_type=Text)
    tenant: str | None = Field(default=None, sa_type=Text)
    user: str | None = Field(default=None, sa_type=Text)
    tier: str | None = Field(default=None, sa_type=Text)
    key_id: str | None = Field(default=None, sa_type=Text)
    feature: str | None = Field(default=None, sa_type=Text)
    route: str | None = Field(default=None, sa_type=Text)
    workflow_id: str | None = Field(default=None, sa_type=Text)
    session_id: str | None = Field(default=None, sa_type=Text)
    experiment: str | None = Field(default=None, sa_type=Text)
    variant: str | None = Field(default=None, sa_type=Text)
    tags: dict[str, str] = Field(default_factory=dict, sa_type=Json)
    provider: str | None = Field(default=None, sa_type=Text)
    api: str | None = Field(default=None, sa_type=Text)
    requested_model: str | None = Field(default=None, sa_type=Text)
    model: str | None = Field(default=None, sa_type=Text)
    calls: int = Field(default=0, sa_type=BigInteger)
    exchanges: int = Field(default=0, sa_type=BigInteger)
    refused: int = Field(default=0, sa_type=BigInteger)
    input_tokens: int | None = Field(default=None, sa_type=BigInteger)
    cached_input_tokens: int | None = Field(default=None, sa_type=BigInteger)
    cache_write_tokens: int | None = Field(default=None, sa_type=BigInteger)
    output_tokens: int | None = Field(default=None, sa_type=BigInteger)
    reasoning_tokens: int | None = Field(default=None, sa_type=BigInteger)
    audio_input_tokens: int | None = Field(default=None, sa_type=BigInteger)
    audio_output_tokens: int | None = Field(default=None, sa_type=BigInteger)
    credits: int | None = Field(default=None, sa_type=BigInteger)
    cost_nanos: int | None = Field(default=None, sa_type=BigInteger)
    saved_nanos: int | None = Field(default=None, sa_type=BigInteger)


class WindowTotal(_Row, table=True):
    """What a calendar or total balance spent in one window. Kept for good: balances are rebuilt from it."""

    __tablename__ = "window_totals"

    balance: str = Field(primary_key=True, sa_type=Text)
    window_start: int = Field(primary_key=True, sa_type=BigInteger)  # ms; 0 for a total
    kind: str = Field(sa_type=Text)
    unit: str = Field(sa_type=Text)
    spent: int = Field(sa_type=BigInteger)


class DrainWatermark(_Row, table=True):
    """How far one store's journal is in the books, and who is at it."""

    __tablename__ = "drain_watermarks"

    partition: str = Field(primary_key=True, sa_type=Text)
    epoch: str = Field(primary_key=True, sa_type=Text)
    position: str = Field(default="", sa_type=Text)
    holder: str | None = Field(default=None, sa_type=Text)
    held_until: int = Field(default=0, sa_type=BigInteger)  # ms


class DeadEntry(_Row, table=True):
    """A journal entry that could not become a row. Its lines are in window_totals all the same."""

    __tablename__ = "dead_entries"

    id: str = Field(primary_key=True, sa_type=Text)
    kind: str = Field(sa_type=Text)
    at: int = Field(sa_type=BigInteger)  # ms, the store's clock
    epoch: str = Field(sa_type=Text)
    position: str = Field(sa_type=Text)
    lines: list[list[Any]] = Field(default_factory=list, sa_type=Json)
    event: str = Field(sa_type=Text)
    error: str = Field(sa_type=Text)


class LedgerFact(_Row, table=True):
    """A fact about the books as a whole: how far raw rows are pruned."""

    __tablename__ = "ledger_facts"

    name: str = Field(primary_key=True, sa_type=Text)
    value: str = Field(sa_type=Text)


def table_of(row: type[_Row]) -> Table:
    """The Core table of a row class: writes and queries speak Core."""
    return cast("Table", row.__table__)  # type: ignore[attr-defined]  # SQLModel sets it at run time

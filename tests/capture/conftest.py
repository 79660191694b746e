"""A guard on a SQLite file, a provider that keeps its own books, and what both say afterwards."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llm_guard_mw import process
from llm_guard_mw.cli.demo.standin import Row, StandIn, running
from llm_guard_mw.ledger import verify


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def provider() -> StandIn:
    return StandIn()


@pytest.fixture
def url(provider: StandIn) -> Iterator[str]:
    with running(provider) as url:
        yield url


@dataclass
class Books:
    """The guard's books, read after everything in flight has been written."""

    installed: process.Installation

    def events(self) -> list[dict[str, Any]]:
        """What the ledger holds, in the order of the calls' exchanges."""
        desk, ledger = self.installed.desk, self.installed.keeper.ledger
        while desk.store.journal_length():
            ledger.drain_all(desk.store)
        return sorted(ledger.events(), key=lambda event: (event["call_id"], event["attempt"]))

    def settled(self) -> list[dict[str, Any]]:
        return [event for event in self.events() if event["kind"] == "settle"]

    def tokens(self) -> list[tuple[int | None, int]]:
        # Embeddings have no output, and say nothing of it.
        return sorted((event["input_tokens"], event["output_tokens"] or 0) for event in self.settled())

    def quiet(self) -> bool:
        """Wait until the thread that settles dropped streams has done so; the caller has let go of them."""
        until = time.monotonic() + 10
        while self.installed.desk.open and time.monotonic() < until:
            gc.collect()
            time.sleep(0.005)
        return not self.installed.desk.open

    async def aquiet(self) -> bool:
        """The same on a loop, which closes dropped generators in turns of its own."""
        until = time.monotonic() + 10
        while self.installed.desk.open and time.monotonic() < until:
            gc.collect()
            await asyncio.sleep(0.005)
        return not self.installed.desk.open

    def add_up(self) -> bool:
        self.events()
        return bool(verify(self.installed.desk.store, self.installed.keeper.ledger).ok)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Callable[..., Books]]:
    """Guard this process: `guarded(limits=["$1/day global"])`."""

    def install(**config: Any) -> Books:
        where = f"sqlite:///{tmp_path / 'guard.db'}"
        config = {"store": where, "ledger": where, "limits": ["$1000/day global"], **config}
        return Books(process.install(config))

    yield install
    process.uninstall()


@pytest.fixture
def books(guarded: Callable[..., Books]) -> Books:
    """The guard with a budget that no test reaches."""
    return guarded()


@pytest.fixture
def served(provider: StandIn) -> Callable[[], list[tuple[int, int]]]:
    """What the provider says it served, in tokens, request by request."""

    def tokens(row: Row) -> tuple[int, int]:
        return row.input_tokens, row.output_tokens

    return lambda: sorted(tokens(row) for row in provider.rows if row.status == 200)

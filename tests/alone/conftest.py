"""A store on a SQLite file, spools for it, and what they say in the log."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_guard_mw.spool import Spool
from llm_guard_mw.stores.sqlite import SQLiteStore
from tests.model.world import Clock

Told = Callable[[str], list[dict[str, Any]]]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[SQLiteStore]:
    store = SQLiteStore(tmp_path / "store.db", clock=clock)
    yield store
    store.close()


@pytest.fixture
def make_spool(tmp_path: Path, store: SQLiteStore) -> Iterator[Callable[[], Spool]]:
    """A process' spool; `close` is its death, as far as files can tell."""
    made: list[Spool] = []

    def make() -> Spool:
        made.append(Spool(tmp_path / "spool", store))
        return made[-1]

    yield make
    for spool in made:
        spool.close()


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Told:
    """The log's lines of one event."""

    def lines(event: str) -> list[dict[str, Any]]:
        said = [json.loads(record.getMessage()) for record in caplog.records if record.name == "llm_guard"]
        return [line for line in said if line["event"] == event]

    return lines

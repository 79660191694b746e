"""Every store, each test: `store` decides by `clock`, which the test turns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_guard_mw.stores.protocol import Store
from tests.model.world import STORES, Clock, make_store


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=sorted(STORES))
def store(request: pytest.FixtureRequest, clock: Clock, tmp_path: Path) -> Iterator[Store]:
    store = make_store(request.param, clock, tmp_path)
    yield store
    store.close()


@pytest.fixture(params=sorted(STORES.keys() - {"reference"}))
def shared_store(request: pytest.FixtureRequest, clock: Clock, tmp_path: Path) -> Iterator[Store]:
    """A store that takes many callers at the same moment; the reference takes one."""
    store = make_store(request.param, clock, tmp_path)
    yield store
    store.close()

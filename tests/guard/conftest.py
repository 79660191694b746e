"""A guard on a SQLite file, driven without a door."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_guard_mw import process


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Callable[..., process.Installation]]:
    """Guard this process: `guarded(limits=["$1/day per user"])`."""

    def install(**config: Any) -> process.Installation:
        where = f"sqlite:///{tmp_path / 'guard.db'}"
        return process.install({"store": where, "ledger": where, "limits": ["$1/day per user"], **config})

    yield install
    process.uninstall()

"""Stores: where balances, holds and the journal live. `protocol` says what one has to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_guard_mw.errors import ConfigError

if TYPE_CHECKING:
    from llm_guard_mw.stores.sqlite import SQLiteStore


def open_store(url: str, *, journal_max: int = 1_000_000) -> SQLiteStore:
    """The store that a URL names: `sqlite:///relative.db`, `sqlite:////absolute.db`. Nothing is opened yet."""
    if url.startswith("sqlite:///") and len(url) > len("sqlite:///"):
        from llm_guard_mw.stores.sqlite import SQLiteStore

        return SQLiteStore(url.removeprefix("sqlite:///"), journal_max=journal_max)
    raise ConfigError(f"store = {url!r}: this version knows sqlite:///PATH")

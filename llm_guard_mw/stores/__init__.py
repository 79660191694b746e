"""Stores: where balances, holds and the journal live. `protocol` says what one has to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_guard_mw.errors import ConfigError
from llm_guard_mw.stores.redis_address import SCHEMES

if TYPE_CHECKING:
    from llm_guard_mw.stores.protocol import ProcessStore


def open_store(url: str, *, journal_max: int = 1_000_000) -> ProcessStore:
    """The store that a URL names. Nothing is opened yet.

    `sqlite:///relative.db`, `sqlite:////absolute.db`, `redis://host:port/db`, `rediss://…` with TLS, and
    `redis+sentinel://host:port,host:port/service`.
    """
    if url.startswith("sqlite:///") and len(url) > len("sqlite:///"):
        from llm_guard_mw.stores.sqlite import SQLiteStore

        return SQLiteStore(url.removeprefix("sqlite:///"), journal_max=journal_max)
    if url.partition("://")[0] in SCHEMES:
        from llm_guard_mw.stores.redis import RedisStore

        return RedisStore(url, journal_max=journal_max)
    raise ConfigError(
        f"store = {url.partition('://')[0]!r}…: this version knows sqlite:///PATH and redis://HOST:PORT/DB"
    )

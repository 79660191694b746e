"""The one guard of this process: made of the first configuration that is named, found by everybody else.

Middleware, `capture` and `current_call` may be created in any order: each asks here at its first use. A second,
different configuration is an error that says so. A forked child keeps the configuration and starts anew.
"""

from __future__ import annotations

import atexit

# It has hooks around a fork itself: were it imported while a fork waits for the keeper, only half of them would run.
import concurrent.futures.thread  # noqa: F401
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_guard_mw import guard
from llm_guard_mw.config import Config, load_config
from llm_guard_mw.desk import Desk
from llm_guard_mw.errors import ConfigError
from llm_guard_mw.identity import Identifier
from llm_guard_mw.keeper import Keeper
from llm_guard_mw.ledger import Ledger
from llm_guard_mw.logs import log
from llm_guard_mw.pricing import PriceBook
from llm_guard_mw.spool import Spool, spool_folder
from llm_guard_mw.stores import open_store

#: Where a configuration is looked for when nobody names one.
CONFIG_VARIABLE = "LLM_GUARD_CONFIG"
DEFAULT_CONFIG = "llm_guard.toml"

ConfigLike = str | os.PathLike[str] | Mapping[str, Any] | Config


@dataclass(frozen=True, slots=True)
class Installation:
    """All parts of the guard, put together."""

    config: Config
    desk: Desk
    keeper: Keeper


_lock = threading.Lock()
_installed: Installation | None = None


def install(config: ConfigLike | None = None) -> Installation:
    """The guard of this process. `config` makes it, or must agree with what made it.

    Without `config`: the one there is, else the file that LLM_GUARD_CONFIG names, else `llm_guard.toml` here.
    """
    global _installed
    if config is None and _installed is not None:
        return _installed
    with _lock:
        if config is None and _installed is not None:
            return _installed
        loaded = _load(config)
        if _installed is None:
            _installed = _put_together(loaded)
            for warning in loaded.warnings:
                log.warning("configuration", where=warning.where, problem=warning.problem, fix=warning.fix)
        elif _installed.config.digest != loaded.digest:
            raise ConfigError(
                f"this process is guarded by {_installed.config.source}, and {loaded.source} says otherwise:"
                " use one configuration in a process"
            )
        return _installed


def uninstall() -> None:
    """Let go of the guard: what waits is written first. For tests, and for the end of the process."""
    global _installed
    with _lock:
        installed, _installed = _installed, None
    if installed is not None:
        _take_apart(installed)


def _load(config: ConfigLike | None) -> Config:
    if isinstance(config, Config):
        return config
    if config is not None:
        return load_config(config)
    path = os.environ.get(CONFIG_VARIABLE, DEFAULT_CONFIG)
    if not Path(path).exists():
        raise ConfigError(
            f"nothing guards this process: no configuration was given, and there is no {path}"
            f" (give config= to the middleware or to Guard, set {CONFIG_VARIABLE}, or run `llm-guard-mw init`)"
        )
    return load_config(path)


def _put_together(config: Config) -> Installation:
    store = open_store(config.store, journal_max=config.policy.journal_max)
    spool = Spool(spool_folder(config.store, config.ledger, config.source, os.environ), store)
    desk = Desk(config.policy, PriceBook(config.prices), Identifier(config.identity), store, spool)
    ledger = Ledger(config.ledger, timezone=config.policy.timezone)
    return Installation(config, desk, Keeper(desk, ledger, retention_days=config.policy.retention_days))


def _take_apart(installed: Installation) -> None:
    installed.keeper.stop()
    installed.desk.store.close()  # what it cannot settle any more, it gives back to the outbox
    installed.desk.alone.keep(installed.desk.outbox)
    installed.desk.spool.close()
    installed.keeper.ledger.close()
    installed.desk.identifier.close()


def _at_exit() -> None:
    """Settle and drain what waits; what a crash leaves undone is done by the next process."""
    if _installed is not None:
        uninstall()


_paused: list[Keeper] = []


def _before_fork() -> None:
    if _installed is not None and _installed.keeper.pause():
        _paused.append(_installed.keeper)


def _after_fork_in_parent() -> None:
    while _paused:
        _paused.pop().resume()


def _after_fork() -> None:
    _paused.clear()
    if _installed is not None:
        _installed.keeper.restart()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork)
# The store registers its own end at its import, which is earlier: so this runs before it.
atexit.register(_at_exit)


class Guard(guard.Guard):
    """The guard of this process, sync: `Guard("llm_guard.toml").as_user(user="ada")`."""

    def __init__(self, config: ConfigLike | None = None) -> None:
        super().__init__(_started(config))


class AsyncGuard(guard.AsyncGuard):
    """The guard of this process, async: `async with AsyncGuard("llm_guard.toml").as_user(user="ada"):`."""

    def __init__(self, config: ConfigLike | None = None) -> None:
        super().__init__(_started(config))


def _started(config: ConfigLike | None) -> Desk:
    installed = install(config)
    installed.keeper.start()
    return installed.desk

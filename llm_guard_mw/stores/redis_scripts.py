"""The Lua scripts of the Redis store, as they are sent: one verb a file, what it shares with others in front of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from llm_guard_mw.model import FOREVER
from llm_guard_mw.stores.protocol import ABANDONED_TOMBSTONE_MS, LATE_SETTLE_MS, TOMBSTONE_MS

_CONSTANTS = {
    "TOMBSTONE_MS": TOMBSTONE_MS,
    "ABANDONED_TOMBSTONE_MS": ABANDONED_TOMBSTONE_MS,
    "LATE_SETTLE_MS": LATE_SETTLE_MS,
    "FOREVER": FOREVER,
}


@dataclass(frozen=True, slots=True)
class Script:
    """A script, and the name by which Redis knows it once it was loaded."""

    name: str
    text: str
    sha: str


def _read(name: str, *shared: str) -> Script:
    folder = files("llm_guard_mw.stores") / "lua"
    constants = "".join(f"local {constant} = {value}\n" for constant, value in _CONSTANTS.items())
    text = constants + "".join((folder / f"{part}.lua").read_text("utf-8") for part in (*shared, name))
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


RESERVE = _read("reserve", "_bucket", "_hold")
SETTLE = _read("settle", "_bucket")
RENEW = _read("renew", "_bucket")
EXPIRE = _read("expire", "_bucket", "_hold")
FORGET = _read("forget", "_bucket")
ADMIT = _read("admit")
TAKE = _read("take")
DROP = _read("drop")

#: By the name that EVALSHA uses.
SCRIPTS = {script.sha: script for script in (RESERVE, SETTLE, RENEW, EXPIRE, FORGET, ADMIT, TAKE, DROP)}

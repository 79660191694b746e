"""The Lua scripts of the Redis store, as they are sent: one verb a file, `_bucket.lua` in front of each."""

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


def _read(name: str) -> Script:
    folder = files("llm_guard_mw.stores") / "lua"
    constants = "".join(f"local {constant} = {value}\n" for constant, value in _CONSTANTS.items())
    shared = (folder / "_bucket.lua").read_text("utf-8")
    text = constants + shared + (folder / f"{name}.lua").read_text("utf-8")
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


RESERVE = _read("reserve")
SETTLE = _read("settle")
RENEW = _read("renew")
EXPIRE = _read("expire")
FORGET = _read("forget")
ADMIT = _read("admit")
TAKE = _read("take")
DROP = _read("drop")

#: By the name that EVALSHA uses.
SCRIPTS = {script.sha: script for script in (RESERVE, SETTLE, RENEW, EXPIRE, FORGET, ADMIT, TAKE, DROP)}

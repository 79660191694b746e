"""Whether a Redis is fit to keep the account: asked once a process, before its first use.

refused   older than 6.2; a maxmemory-policy that evicts; contents of another version
warned    no persistence; a clock more than a second from ours
told      which server it is
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llm_guard_mw.errors import ConfigError
from llm_guard_mw.logs import log
from llm_guard_mw.stores.redis_keys import PARTITIONS, SCHEMA_VERSION
from llm_guard_mw.stores.redis_steps import Command, Steps, Talk, wall_clock_ms

OLDEST = (6, 2)
SKEW_MAX_MS = 1000


def look_over(steps: Steps, name: str) -> Talk[None]:
    """Ask, judge, log. Raises ConfigError where nothing good can come of it.

    An error reply counts as "not said": managed servers and careful ACLs forbid some of the questions.
    """
    questions: list[Command] = [
        ("INFO", "server"),
        ("INFO", "memory"),
        ("INFO", "persistence"),
        ("CONFIG", "GET", "save"),
        ("HSETNX", steps.keys.meta, "schema", SCHEMA_VERSION),
        ("HSETNX", steps.keys.meta, "partitions", PARTITIONS),
        ("HMGET", steps.keys.meta, "schema", "partitions"),
    ]
    server, memory, persistence, save, _, _, kept = yield questions
    _judge_server(_fields(server), name)
    _judge_eviction(_fields(memory), name)
    _judge_contents(kept, name)
    _judge_persistence(_fields(persistence), save, name)
    if steps.injected is None:
        asked = wall_clock_ms()
        ((seconds, micros),) = yield [("TIME",)]
        steps.told_time(asked, int(seconds), int(micros))
        if abs(steps.offset) > SKEW_MAX_MS:
            log.warning("redis_clock_skew", store=name, ahead_ms=steps.offset)


def _fields(info: Any) -> Mapping[str, str]:
    if not isinstance(info, bytes):
        return {}
    lines = (line.partition(":") for line in info.decode("utf-8", "replace").splitlines())
    return {key: value for key, colon, value in lines if colon}


def _judge_server(server: Mapping[str, str], name: str) -> None:
    said = server.get("redis_version", "")
    version = tuple(int(part) for part in re.findall(r"\d+", said)[:3])
    if version and version < OLDEST:
        raise ConfigError(f"store {name} is Redis {said}: 6.2 is the oldest that has what the store needs")
    product = f"Valkey {server['valkey_version']}" if "valkey_version" in server else f"Redis {said or 'unknown'}"
    log.info("redis_store", store=name, server=product, compatible=said)


def _judge_eviction(memory: Mapping[str, str], name: str) -> None:
    policy = memory.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise ConfigError(
            f"store {name}: maxmemory-policy is {policy!r}, so Redis would throw balances away when its memory is"
            ' full, and with them what was spent; set "maxmemory-policy noeviction" (a full Redis then answers 503)'
        )


def _judge_contents(kept: Any, name: str) -> None:
    if not isinstance(kept, Sequence):
        return
    for what, found, known in zip(("schema", "partitions"), kept, (SCHEMA_VERSION, PARTITIONS), strict=True):
        if found is not None and int(found) != known:
            raise ConfigError(
                f"store {name} was written with {what} {int(found)}, this version of llm_guard_mw knows {known}:"
                " use the version that wrote it, or another ?prefix="
            )


def _judge_persistence(persistence: Mapping[str, str], save: Any, name: str) -> None:
    if not persistence or persistence.get("aof_enabled") == "1":
        return
    snapshots = isinstance(save, list) and len(save) == 2 and save[1] != b""
    if isinstance(save, list) and not snapshots:
        log.warning("redis_without_persistence", store=name, fix="appendonly yes")

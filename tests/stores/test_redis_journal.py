"""The journal's stream and its consumer group, under all that may happen to them from outside; on every server."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import redis

from llm_guard_mw.model import JournalEntry
from llm_guard_mw.stores.journal import encode_event
from llm_guard_mw.stores.protocol import Unreadable
from llm_guard_mw.stores.redis import RedisStore
from tests.model import servers
from tests.model.world import event_of

STREAM, GROUP = "llm_guard:{p00}:journal", "ledger"
LONG = 3_600_000
numbers = itertools.count()


@pytest.fixture(params=servers.LEGS)
def leg(request: pytest.FixtureRequest) -> servers.Server:
    if reason := servers.missing(request.param):
        pytest.skip(reason)
    return servers.emptied(request.param)


@pytest.fixture
def store(leg: servers.Server) -> Iterator[RedisStore]:
    store = RedisStore(leg.url)
    yield store
    store.close()


@pytest.fixture
def outside(leg: servers.Server) -> Iterator[redis.Redis]:
    """Somebody else on the same server."""
    with leg.client() as client:
        yield client


def enter(store: RedisStore, count: int) -> list[str]:
    """So many entries more; the positions of all there are."""
    for _ in range(count):
        call = f"c{next(numbers)}"
        store.append(f"{call}/1/refused", encode_event(event_of(f"{call}/1")))
    return [entry.position for entry in store.read_journal("", 1000)]


def take(store: RedisStore, consumer: str, count: int = 100, idle_ms: int = LONG) -> list[str]:
    return [entry.position for entry in store.take_journal(consumer, count, idle_ms)]


def test_a_group_that_is_gone_is_made_again_from_the_beginning(store: RedisStore, outside: redis.Redis) -> None:
    positions = enter(store, 3)
    store.drop_journal(take(store, "a", 1))
    take(store, "a", 1)

    outside.xgroup_destroy(STREAM, GROUP)

    assert take(store, "b") == positions[1:]


def test_an_emptied_server_is_drained_like_a_new_one(store: RedisStore, outside: redis.Redis) -> None:
    enter(store, 2)
    take(store, "a")

    outside.flushdb()

    assert take(store, "a") == []
    positions = enter(store, 2)
    assert take(store, "a") == positions


def test_a_stream_from_before_there_was_a_group_is_drained_from_its_beginning(
    store: RedisStore, outside: redis.Redis
) -> None:
    positions = enter(store, 2)
    assert outside.xinfo_groups(STREAM) == []

    assert take(store, "a") == positions


def test_what_a_removed_consumer_had_in_hand_is_found_again(store: RedisStore, outside: redis.Redis) -> None:
    positions = enter(store, 3)
    take(store, "a", 2)

    outside.xgroup_delconsumer(STREAM, GROUP, "a")

    store.drop_journal(take(store, "b", 1))
    assert take(store, "b") == positions[:2]


def test_a_group_that_was_moved_past_entries_finds_them_again(store: RedisStore, outside: redis.Redis) -> None:
    enter(store, 1)
    store.drop_journal(take(store, "a"))
    positions = enter(store, 3)

    outside.xgroup_setid(STREAM, GROUP, "$")

    assert take(store, "a") == positions


def test_what_somebody_removed_from_the_stream_is_nobodys_any_more(store: RedisStore, outside: redis.Redis) -> None:
    enter(store, 4)
    take(store, "a", 2)
    take(store, "b", 2)
    outside.xtrim(STREAM, maxlen=0)

    assert take(store, "a") == []

    more = enter(store, 1)
    assert (take(store, "a"), take(store, "b", idle_ms=0)) == (more, more)
    store.drop_journal(more)
    assert take(store, "b") == []


@pytest.mark.parametrize("removed", [0, 1])
def test_what_is_left_of_a_dead_ones_batch_is_given_on(store: RedisStore, outside: redis.Redis, removed: int) -> None:
    positions = enter(store, 2)
    take(store, "dead")
    ms, _, number = positions[removed].partition("-")
    outside.xdel(STREAM, f"{int(ms)}-{int(number)}")

    assert take(store, "a", idle_ms=0) == [positions[1 - removed]]


def test_an_acknowledged_entry_leaves_stream_and_group_together(store: RedisStore, outside: redis.Redis) -> None:
    enter(store, 3)

    store.drop_journal(take(store, "a", 2))

    assert outside.xlen(STREAM) == 1
    assert outside.xpending(STREAM, GROUP)["pending"] == 0


def test_names_of_dead_processes_go_when_nothing_is_in_their_hands(
    store: RedisStore, outside: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(store, 3)
    take(store, "dead with an entry", 1)
    store.drop_journal(take(store, "dead", 1))
    monkeypatch.setattr("llm_guard_mw.stores.redis_steps._CONSUMER_FORGOTTEN_MS", -1)

    take(store, "new")

    names = {consumer["name"].decode() for consumer in outside.xinfo_consumers(STREAM, GROUP)}
    assert names == {"dead with an entry", "new"}


def test_other_groups_on_the_stream_are_left_alone(store: RedisStore, outside: redis.Redis) -> None:
    positions = enter(store, 2)
    outside.xgroup_create(STREAM, "analytics", "0")

    assert take(store, "a") == positions


@pytest.mark.parametrize(
    "fields",
    [
        {"hello": "world"},
        {"id": "x", "kind": "nothing we know", "at": "1", "lines": b"\x90", "payload": "{}", "offer": "0", "cap": "0"},
        {"id": "x", "kind": "settle", "at": "soon", "lines": b"\x90", "payload": "{}", "offer": "0", "cap": "0"},
        {"id": "x", "kind": "settle", "at": "1", "lines": b"\xff", "payload": "{}", "offer": "0", "cap": "0"},
        {"id": b"\xff", "kind": "settle", "at": "1", "lines": b"\x90", "payload": "{}", "offer": "0", "cap": "0"},
        {"id": "x", "kind": "settle", "at": "1", "lines": b"\x90"},
        {"id": "x", "kind": "abandoned", "at": "1", "lines": b"\x90", "payload": "{}", "offer": "none", "cap": "0"},
    ],
)
def test_what_a_stranger_has_added_is_handed_out_as_unreadable(
    store: RedisStore, outside: redis.Redis, fields: dict[str, str | bytes]
) -> None:
    outside.xadd(STREAM, fields)  # type: ignore[arg-type]  # it says: of one type
    enter(store, 1)

    strange, sound = store.take_journal("a", 10)

    assert isinstance(strange, Unreadable)
    assert strange.error
    assert isinstance(sound, JournalEntry)

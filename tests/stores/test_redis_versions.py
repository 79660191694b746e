"""What the first version of the Redis store left there is read, booked and settled by this one."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from llm_guard_mw.model import Basis, EntryKind, Kind, Line, Unit
from llm_guard_mw.stores.journal import Estimate, encode_draft, encode_event
from llm_guard_mw.stores.protocol import Granted, HoldState, Settled
from llm_guard_mw.stores.redis import RedisStore
from tests.model import servers
from tests.model.world import LEASE, NOON, Clock, event_of, offer, prepaid, requests, settlement, wish

_pack = msgspec.msgpack.encode
P = "llm_guard:{p00}:"
SPENT_AT_ONCE = Line("alice|rpm", Kind.BUCKET, Unit.REQUESTS, 0, 1, True)
HELD = Line("alice|pot", Kind.TOTAL, Unit.CREDITS, 0, 40)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(server: servers.Server, clock: Clock) -> Iterator[RedisStore]:
    """A store that finds two balances and an open exchange, as they were written then."""
    draft = encode_draft(event_of("c/1"), [Estimate("allow", "m", 10, 1000, 7, "prices-1")])
    lines = [each for line in (HELD, SPENT_AT_ONCE) for each in msgspec.structs.astuple(line)]
    hold = _pack(["c", 0, 5, False, *lines])
    with server.client() as client:
        client.hset(
            f"{P}b:alice",
            mapping={
                "ttl": 2**53 - 1,
                "pot": _pack(["t", 0, 100, 40, 0, 0, 0, 0, 1, 3, 2**53 - 1]),
                "rpm": _pack(["b", 0, 1, 0, 0, NOON, 60, 60_000, 1, 1, NOON + 10**9]),
            },
        )
        client.zadd(f"{P}subjects", {f"{P}b:alice|": 0})
        client.set(f"{P}x:c/1", b"+" + len(hold).to_bytes(4) + hold + draft)
        client.zadd(f"{P}due", {"c/1": NOON + LEASE})
    store = RedisStore(server.url, clock=clock)
    yield store
    store.close()


def amounts(store: RedisStore) -> dict[str, tuple[int, int]]:
    return {state.balance: (state.spent, state.held) for state in store.balances("", 10)}


def test_its_balances_and_holds_are_told(store: RedisStore) -> None:
    assert amounts(store) == {"alice|pot": (100, 40), "alice|rpm": (1, 0)}
    assert store.holds("", 10) == (HoldState("c/1", "c", NOON + LEASE, (HELD, SPENT_AT_ONCE)),)


def test_its_holds_are_settled(store: RedisStore) -> None:
    assert store.settle(settlement("c/1", (HELD, SPENT_AT_ONCE), NOON + LEASE, {"alice|pot": 25})) is Settled.DONE

    assert amounts(store)["alice|pot"] == (125, 0)


def test_its_holds_are_released_by_those_who_never_learnt_them(store: RedisStore) -> None:
    assert store.settle(settlement("c/1", (), NOON, kind=EntryKind.RELEASE)) is Settled.DONE

    assert amounts(store) == {"alice|pot": (100, 0), "alice|rpm": (1, 0)}


def test_its_holds_are_taken_over(store: RedisStore) -> None:
    wanted = wish("c/2", offer(prepaid("alice|pot", 150, 50)), takes="c/1")

    granted = store.reserve(wanted)

    assert isinstance(granted, Granted)
    assert granted.took
    assert granted.lines == (SPENT_AT_ONCE, Line("alice|pot", Kind.TOTAL, Unit.CREDITS, 0, 50))
    assert amounts(store)["alice|pot"] == (100, 50)


def test_its_holds_are_booked_when_nobody_renews_them(store: RedisStore, clock: Clock) -> None:
    clock.forward(LEASE)

    assert store.expire() == 1

    assert amounts(store)["alice|pot"] == (140, 0)
    (entry,) = store.read_journal("", 10)
    assert (entry.id, entry.lines) == ("c/1/abandoned", (HELD, SPENT_AT_ONCE))
    assert entry.event.basis is Basis.ABANDONED  # type: ignore[union-attr]  # it is readable, or this would fail
    assert entry.event.cost_nanos == 1000 + 5 * 7  # type: ignore[union-attr]  # the same


def test_its_grants_are_told_again(store: RedisStore) -> None:
    wanted = wish("c/1", offer(prepaid("alice|pot", 1000, 40), requests("alice|rpm", 5)))

    again = store.reserve(wanted)

    assert isinstance(again, Granted)
    assert (again.cap, again.lines, again.lease_end) == (5, (HELD, SPENT_AT_ONCE), NOON + LEASE)


def test_its_entries_are_read(store: RedisStore, server: servers.Server) -> None:
    event = event_of("c/1", cost_nanos=500)
    with server.client() as client:
        client.xadd(
            f"{P}journal",
            {
                "id": "c/1/settle",
                "kind": "settle",
                "at": NOON,
                "lines": _pack(msgspec.structs.astuple(HELD)),
                "payload": encode_event(event),
                "offer": -1,
                "cap": -1,
            },
        )

    (entry,) = store.read_journal("", 10)

    assert (entry.id, entry.kind, entry.at, entry.lines) == ("c/1/settle", EntryKind.SETTLE, NOON, (HELD,))
    assert entry.event == event  # type: ignore[union-attr]  # it is readable, or this would fail

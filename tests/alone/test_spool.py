"""The spool's files: settled in order, once, by whoever is alive; nothing is lost without a word."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_guard_mw import spool_records
from llm_guard_mw.errors import StoreUnavailable
from llm_guard_mw.model import EntryKind, JournalEntry, Kind, Line, Unit
from llm_guard_mw.spool import Spool, spool_folder
from llm_guard_mw.spool_records import Begun, Ended, begun, ended, frames
from llm_guard_mw.stores.journal import encode_event
from llm_guard_mw.stores.protocol import Granted, Moved, Settled, Settlement
from llm_guard_mw.stores.sqlite import SQLiteStore
from tests.alone.conftest import Told
from tests.model.world import DAY, NOON, Clock, day_start, days, dollars, event_of, offer, wish

MakeSpool = Callable[[], Spool]
HELD = 100


def begins(exchange: str) -> Begun:
    wished = wish(exchange, offer(dollars("day", 1000, HELD)))
    line = Line("day", Kind.CALENDAR, Unit.USD, day_start(NOON), HELD)
    return begun(wished, Granted(0, 0, (line,), (), NOON, NOON), lambda _line: 0)


def ends(exchange: str, actual: int = 60) -> Ended:
    moved = (Moved(Line("day", Kind.CALENDAR, Unit.USD, day_start(NOON), 0), actual),)
    payload = encode_event(event_of(exchange, cost_nanos=actual))
    return ended(Settlement(exchange, exchange[0], EntryKind.SETTLE, NOON, moved, payload, fresh=True), lambda _line: 0)


def write(spool: Spool, *exchanges: str) -> None:
    for exchange in exchanges:
        spool.begin(begins(exchange))
        spool.end(ends(exchange))


def journal(store: SQLiteStore) -> list[str]:
    return [entry.id for entry in store.read_journal("", 1000)]


def spent(store: SQLiteStore) -> int:
    return store.peek(["day"])[0].spent


def files(spool: Spool) -> list[Path]:
    return sorted(spool.folder.iterdir()) if spool.folder.exists() else []


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """What a full disk does to a write: the system refuses it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---------------------------------------------------------------- replay


def test_what_ended_is_settled_in_order_and_the_file_is_gone(make_spool: MakeSpool, store: SQLiteStore) -> None:
    spool = make_spool()
    write(spool, "a/1", "b/1", "c/1")

    assert spool.replay() == 3

    assert journal(store) == ["a/1/settle", "b/1/settle", "c/1/settle"]
    assert spent(store) == 180
    assert files(spool) == []
    assert spool.is_empty


def test_what_is_open_keeps_the_file_until_it_ends(make_spool: MakeSpool, store: SQLiteStore) -> None:
    spool = make_spool()
    spool.begin(begins("a/1"))
    write(spool, "b/1")

    spool.replay()

    assert journal(store) == ["b/1/settle"]
    assert len(files(spool)) == 1
    spool.end(ends("a/1"))
    spool.replay()
    assert journal(store) == ["b/1/settle", "a/1/settle"]
    assert files(spool) == []


def test_an_exchange_that_another_has_taken_over_is_not_booked(make_spool: MakeSpool, store: SQLiteStore) -> None:
    spool = make_spool()
    spool.begin(begins("a/0"))
    taker = wish("a/1", offer(dollars("day", 1000, HELD)), takes="a/0")
    spool.begin(begun(taker, Granted(0, 0, (), (), NOON, NOON, took=True), lambda _line: 0))
    spool.end(ends("a/1"))
    spool.close()

    make_spool().replay()

    assert journal(store) == ["a/1/settle"]


def test_a_usage_of_yesterday_is_not_debited_to_today(make_spool: MakeSpool, store: SQLiteStore, clock: Clock) -> None:
    spool = make_spool()
    write(spool, "a/1")
    clock.forward(DAY)
    store.reserve(wish("z/1", offer(dollars("day", 1000, 1, windows=days(clock.now)))))

    spool.replay()

    state = store.peek(["day"])[0]
    assert (state.window_start, state.spent) == (day_start(clock.now), 0)
    entry = store.read_journal("", 1)[0]
    assert isinstance(entry, JournalEntry)
    assert [(line.window_start, line.amount) for line in entry.lines] == [(day_start(NOON), 60)]


# ---------------------------------------------------------------- once, whatever dies when


@dataclass
class Failing:
    """The store, up to the moment at which it goes away: before a settlement, or behind it with its reply."""

    store: SQLiteStore
    left: int
    applied: bool

    def __getattr__(self, name: str):  # type: ignore[no-untyped-def] # whatever the store has
        return getattr(self.store, name)

    def settle(self, settlement: Settlement) -> Settled:
        self.left -= 1
        if self.left < 0:
            if self.applied:
                self.store.settle(settlement)
            raise StoreUnavailable("away")
        return self.store.settle(settlement)


@settings(max_examples=40, suppress_health_check=list(HealthCheck), deadline=None)
@given(count=st.integers(1, 6), cuts=st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=4))
def test_however_often_it_is_broken_off_each_record_counts_once(
    tmp_path_factory: pytest.TempPathFactory, count: int, cuts: list[tuple[int, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("once")
    clock = Clock()
    store = SQLiteStore(folder / "store.db", clock=clock)
    writer = Spool(folder / "spool", store)
    write(writer, *[f"{n}/1" for n in range(count)])
    writer.begin(begins("open/1"))
    writer.close()

    for left, applied in cuts:
        broken = Spool(folder / "spool", Failing(store, left, applied))  # type: ignore[arg-type] # it has all there is
        with suppress(StoreUnavailable):
            broken.replay()
        broken.close()
        clock.forward(DAY)  # no ending is remembered
        store.expire()
    last = Spool(folder / "spool", store)
    last.replay()

    assert journal(store) == [*[f"{n}/1/settle" for n in range(count)], "open/1/settle"]
    assert not any((folder / "spool").iterdir())
    last.close()
    store.close()


def test_a_living_process_keeps_its_file_to_itself(make_spool: MakeSpool, store: SQLiteStore) -> None:
    living, other = make_spool(), make_spool()
    write(living, "a/1")

    other.replay()

    assert journal(store) == []
    living.close()
    other._look_at = 0.0  # it is time to look again
    other.replay()
    assert journal(store) == ["a/1/settle"]


def test_a_forked_child_lets_go_of_the_file_and_its_parent_keeps_the_lock(
    make_spool: MakeSpool, store: SQLiteStore
) -> None:
    spool, other = make_spool(), make_spool()
    write(spool, "a/1")
    child = os.fork()
    if child == 0:
        os._exit(0 if spool.is_empty else 1)
    _, status = os.waitpid(child, 0)

    other.replay()

    assert status == 0
    assert journal(store) == []
    assert spool.replay() == 1


def test_what_a_dead_process_had_begun_is_booked_as_it_was_held(
    make_spool: MakeSpool, store: SQLiteStore, told: Told
) -> None:
    dead = make_spool()
    dead.begin(begins("a/1"))
    write(dead, "b/1")
    dead.close()

    make_spool().replay()

    by_id = {entry.id: entry for entry in store.read_journal("", 10)}
    assert list(by_id) == ["b/1/settle", "a/1/settle"]
    entry = by_id["a/1/settle"]
    assert isinstance(entry, JournalEntry)
    assert (entry.event.basis, entry.event.error_type, entry.event.user) == ("abandoned", "abandoned", "alice")
    assert entry.event.at == NOON * 1000
    assert spent(store) == HELD + 60
    assert told("spool_abandoned")[0]["exchanges"] == 1


def test_the_file_of_another_store_is_left_alone_and_told(
    make_spool: MakeSpool, store: SQLiteStore, tmp_path: Path, told: Told
) -> None:
    elsewhere = SQLiteStore(tmp_path / "other.db")
    strange = Spool(tmp_path / "spool", elsewhere)
    write(strange, "a/1")
    strange.close()
    spool = make_spool()

    spool.replay()

    assert journal(store) == []
    assert len(files(spool)) == 1
    assert told("spool_of_another_store")[0]["store"] == elsewhere.name
    elsewhere.close()


# ---------------------------------------------------------------- damage


@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data())
def test_damage_costs_what_it_hit_and_is_told(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damage")
    store = SQLiteStore(folder / "store.db", clock=Clock())
    writer = Spool(folder / "spool", store)
    write(writer, "a/1", "b/1", "c/1")
    writer.close()
    [path] = files(writer)
    whole = path.read_bytes()
    at = int(data.draw(st.floats(0, 1, exclude_max=True), "where") * len(whole))
    if data.draw(st.booleans(), "torn"):
        hurt = whole[:at]
    else:
        hurt = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255), "flip")]) + whole[at + 1 :]
    path.write_bytes(hurt)
    flipped = len(hurt) == len(whole) and hurt != whole
    # header, then begun and ended of a, b, c: what is left of them says what is booked
    left = {found.sequence for found in frames(hurt) if hasattr(found, "sequence")}
    expected = [f"{name}/1/settle" for n, name in enumerate("abc") if 2 + 2 * n in left]
    held = [f"{name}/1/settle" for n, name in enumerate("abc") if 2 + 2 * n not in left and 1 + 2 * n in left]

    reader = Spool(folder / "spool", store)
    reader.replay()
    reader.close()

    assert journal(store) == expected + held
    assert [each.suffix for each in files(reader)] == ([".damaged"] if flipped else [])
    store.close()


def test_the_log_says_what_was_damaged_and_how_many_records_are_missing(
    make_spool: MakeSpool, store: SQLiteStore, told: Told
) -> None:
    dead = make_spool()
    write(dead, "a/1", "b/1")
    dead.close()
    [path] = files(dead)
    whole = bytearray(path.read_bytes())
    whole[[found.start for found in frames(bytes(whole))][2] + 30] ^= 1  # how a/1 ended
    path.write_bytes(whole + b"\xff\x00torn")

    make_spool().replay()

    assert [(line["level"], line["bytes"] > 0) for line in told("spool_damaged")] == [("error", True)]
    assert told("spool_records_missing")[0]["records"] == 1
    assert told("spool_torn")[0]["bytes"] == 6
    assert journal(store) == ["b/1/settle", "a/1/settle"]
    assert spent(store) == 60 + HELD, "how it ended is lost, so that what it held is booked"


# ---------------------------------------------------------------- full


def test_a_spool_that_is_full_takes_no_new_exchange_but_the_end_of_those_it_has(
    make_spool: MakeSpool, store: SQLiteStore
) -> None:
    spool = make_spool()
    spool.begin(begins("a/1"))
    spool.bytes_max = 10

    with pytest.raises(StoreUnavailable, match="full"):
        spool.begin(begins("b/1"))

    spool.end(ends("a/1"))
    spool.replay()
    assert journal(store) == ["a/1/settle"]


def test_a_full_disk_takes_no_new_exchange_and_loses_no_old_one(
    make_spool: MakeSpool, store: SQLiteStore, told: Told
) -> None:
    spool = make_spool()
    spool.begin(begins("a/1"))
    [path] = files(spool)

    with no_file_larger_than(path.stat().st_size + 100):
        spool.end(ends("a/1"))
        with pytest.raises(StoreUnavailable):
            spool.begin(begins("b/1"))

    assert told("spool_not_written")
    spool.replay()
    assert journal(store) == []
    spool.sync()
    spool.replay()
    assert journal(store) == ["a/1/settle"]
    assert told("spool_damaged") == told("spool_torn") == []


def test_a_record_too_long_is_refused_before_the_grant_and_booked_as_held_after_it(
    make_spool: MakeSpool, store: SQLiteStore, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = make_spool()
    spool.begin(begins("a/1"))
    monkeypatch.setattr(spool_records, "BODY_BYTES_MAX", 100)

    with pytest.raises(StoreUnavailable, match="too long"):
        spool.begin(begins("b/1"))
    spool.end(ends("a/1"))
    monkeypatch.undo()
    spool.replay()

    assert told("spool_record_too_long")
    assert spent(store) == HELD


# ---------------------------------------------------------------- where it lies


def test_the_spool_lies_where_the_variable_says_else_beside_what_there_is(tmp_path: Path) -> None:
    config = tmp_path / "app" / "llm_guard.toml"
    config.parent.mkdir()
    config.touch()
    redis, sqlite, postgres = "redis://h/0", "sqlite:////data/guard.db", "postgresql://h/books"

    assert spool_folder(redis, sqlite, str(config), {"LLM_GUARD_SPOOL": "/spool"}) == Path("/spool")
    assert spool_folder(sqlite, postgres, str(config), {}) == Path("/data/llm_guard.spool")
    assert spool_folder(redis, sqlite, str(config), {}) == Path("/data/llm_guard.spool")
    assert spool_folder(redis, postgres, str(config), {}) == config.parent / "llm_guard.spool"
    assert spool_folder(redis, postgres, "configuration", {}) == Path.cwd() / "llm_guard.spool"

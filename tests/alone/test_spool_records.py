"""The format of the spool: whatever happens to the bytes, each record that is whole is read, and the rest is told."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llm_guard_mw.model import EntryKind, Kind, Line, Unit
from llm_guard_mw.spool_records import Damage, Ended, Frame, Moved, decode, encode, ended, frame, frames, settlement_of
from llm_guard_mw.stores.journal import encode_event
from llm_guard_mw.stores.protocol import Replay, Settlement
from tests.model.world import NOON, event_of

bodies = st.lists(st.binary(max_size=60).map(lambda body: body.replace(b"\xff", b"")), min_size=1, max_size=8)


def written(bodies: list[bytes]) -> bytes:
    return b"".join(frame(sequence, body) for sequence, body in enumerate(bodies))


def starts(bodies: list[bytes]) -> list[int]:
    found = [0]
    for sequence, body in enumerate(bodies):
        found.append(found[-1] + len(frame(sequence, body)))
    return found


@given(bodies)
def test_what_was_written_is_read(bodies: list[bytes]) -> None:
    read = list(frames(written(bodies)))

    assert [(each.sequence, each.body) for each in read if isinstance(each, Frame)] == list(enumerate(bodies))
    assert len(read) == len(bodies)


@given(bodies, st.data())
def test_a_torn_tail_is_told_and_costs_itself_alone(bodies: list[bytes], data: st.DataObject) -> None:
    whole = written(bodies)
    cut = data.draw(st.integers(0, len(whole)), "cut")

    read = list(frames(whole[:cut]))

    intact = sum(end <= cut for end in starts(bodies)[1:])
    assert [each.body for each in read if isinstance(each, Frame)] == bodies[:intact]
    torn = [each for each in read if isinstance(each, Damage)]
    assert [(each.start, each.end, each.torn) for each in torn] == (
        [] if cut in starts(bodies) else [(starts(bodies)[intact], cut, True)]
    )


@settings(max_examples=300)
@given(bodies, st.data())
def test_a_flipped_byte_costs_the_record_it_is_in_and_is_told(bodies: list[bytes], data: st.DataObject) -> None:
    whole = bytearray(written(bodies))
    at = data.draw(st.integers(0, len(whole) - 1), "at")
    whole[at] ^= data.draw(st.integers(1, 255), "flip")

    read = list(frames(bytes(whole)))

    hit = max(n for n, start in enumerate(starts(bodies)[:-1]) if start <= at)
    expected = [(n, body) for n, body in enumerate(bodies) if n != hit]
    assert [(each.sequence, each.body) for each in read if isinstance(each, Frame)] == expected
    told = [each for each in read if isinstance(each, Damage)]
    assert [(each.start, each.end) for each in told] == [(starts(bodies)[hit], starts(bodies)[hit + 1])]


@settings(max_examples=300)
@given(bodies, st.data())
def test_of_any_damage_nothing_is_read_that_was_not_written_and_nothing_left_out_in_silence(
    bodies: list[bytes], data: st.DataObject
) -> None:
    whole = bytearray(written(bodies))
    for _ in range(data.draw(st.integers(1, 4), "wounds")):
        at = data.draw(st.integers(0, len(whole)), "at")
        whole[at : at + data.draw(st.integers(0, 30), "lost")] = data.draw(st.binary(max_size=30), "instead")

    read = list(frames(bytes(whole)))

    for each in read:
        assert isinstance(each, Damage) or bodies[each.sequence] == each.body
    edges = [(each.start, each.end) for each in read]
    assert [start for start, _ in edges] == [0, *[end for _, end in edges]][: len(edges)]
    assert not edges or edges[-1][1] == len(whole)


def test_a_settlement_is_the_same_after_its_way_through_a_record() -> None:
    line = Line("user=ada|x", Kind.CALENDAR, Unit.USD, NOON, 7)
    moved = (Moved(line, 5), Moved(Line("b", Kind.BUCKET, Unit.REQUESTS, 0, 0, spent=True), 1))
    payload = encode_event(event_of("c/1", cost_nanos=5), held_nanos=7)
    settlement = Settlement("c/1", "c", EntryKind.SETTLE, NOON, moved, payload, fresh=True)
    replay = Replay("s", 3)

    record = decode(encode(ended(settlement, lambda _line: 0)))

    assert isinstance(record, Ended)
    assert settlement_of(record, replay, NOON) == Settlement(
        "c/1", "c", EntryKind.SETTLE, NOON, moved, payload, fresh=True, replay=replay
    )


def test_a_bucket_that_has_drained_meanwhile_is_not_filled_again() -> None:
    moved = (Moved(Line("b", Kind.BUCKET, Unit.TOKENS, 0, 0), 9), Moved(Line("d", Kind.CALENDAR, Unit.USD, 0, 0), 5))
    settlement = Settlement("c/1", "c", EntryKind.SETTLE, NOON, moved, encode_event(event_of("c/1")), fresh=True)
    record = ended(settlement, lambda line: NOON + 1000 if line.kind is Kind.BUCKET else 0)

    assert settlement_of(record, Replay("s", 1), NOON + 999).moved == moved
    assert settlement_of(record, Replay("s", 1), NOON + 1000).moved == moved[1:]

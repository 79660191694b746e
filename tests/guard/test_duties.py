"""How much of the interpreter the drain takes beside requests, and how long a ledger that fails is left alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from llm_guard_mw.duties import SHARE_MAX, SHARE_MIN, Room


@dataclass
class Clocks:
    """Seconds of the clock, of the process' CPU, of the draining thread's; the test turns them."""

    wall: float = 0.0
    process: float = 0.0
    own: float = 0.0

    def __call__(self) -> tuple[float, float, float]:
        return self.wall, self.process, self.own

    def forward(self, wall: float, others: float, own: float = 0.0) -> None:
        self.wall, self.process, self.own = self.wall + wall, self.process + others + own, self.own + own


def after(wall: float, others: float, own: float = 0.0) -> Room:
    """A room that has seen this."""
    clocks = Clocks()
    room = Room(clocks)
    clocks.forward(wall, others, own)
    room.look()
    return room


def test_an_idle_process_leaves_the_drain_half_a_core() -> None:
    assert after(1.0, others=0.0).share(0) == SHARE_MAX


def test_a_busy_process_leaves_it_what_is_free() -> None:
    assert after(1.0, others=0.7).share(0) == pytest.approx(0.3)


@pytest.mark.parametrize("others", [1.0, 3.5])
def test_a_process_that_takes_all_there_is_leaves_it_a_little(others: float) -> None:
    assert after(1.0, others=others).share(0) == SHARE_MIN


def test_its_own_work_is_not_held_against_it() -> None:
    assert after(1.0, others=0.6, own=0.4).share(0) == pytest.approx(0.4)


def test_a_journal_that_fills_takes_more_than_is_free() -> None:
    room = after(1.0, others=1.0)

    assert [round(room.share(fullness), 2) for fullness in (0.01, 0.25, 0.81, 1.0, 1.7)] == [0.1, 0.5, 0.9, 1.0, 1.0]


def test_a_look_too_soon_after_the_last_one_says_nothing() -> None:
    clocks = Clocks()
    room = Room(clocks)
    clocks.forward(1.0, others=0.8)
    room.look()
    clocks.forward(0.01, others=0.0)
    room.look()

    assert room.busy == pytest.approx(0.8)


def test_after_a_batch_it_rests_until_the_batch_was_its_share() -> None:
    room = after(1.0, others=0.8)

    assert room.rest(cpu=0.01, wall=0.02, fullness=0) == pytest.approx(0.03)


def test_a_batch_that_waited_longer_than_it_worked_needs_no_rest() -> None:
    assert after(1.0, others=0.0).rest(cpu=0.01, wall=0.1, fullness=0) == 0.0

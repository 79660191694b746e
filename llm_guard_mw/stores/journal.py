"""How drafts and events are written into the journal, and how an entry is read back.

An entry is a pure function of what the store kept: the draft (written at reserve) or the event (written at
settle), and the kind of ending. The store copies the bytes and never looks into them, so that a Lua script can
do the same.

    draft    {"event": UsageEvent, "offers": [Estimate, ...]}     one Estimate an offer, in order
    event    {"event": UsageEvent, "held_nanos": …, …}              what a correction has to take back

What is at its default is left out, as most of an event is; entries of earlier versions say all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from llm_guard_mw.model import Basis, Decision, EntryKind, UsageEvent


class Estimate(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What one offer would cost if its hold were booked: `fixed_nanos + output_nanos * cap`."""

    decision: Decision
    model: str | None
    input_tokens: int | None
    fixed_nanos: int | None  # None: no price is known
    output_nanos: int
    price_version: str
    choices: int = 1

    def cost_nanos(self, cap: int) -> int | None:
        return None if self.fixed_nanos is None else self.fixed_nanos + self.output_nanos * cap


class _Draft(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    event: UsageEvent
    offers: tuple[Estimate, ...]


class _Closing(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    event: UsageEvent
    held_nanos: int | None = None
    held_credits: int | None = None


_encode = msgspec.json.Encoder().encode
_decode_draft = msgspec.json.Decoder(_Draft).decode
_decode_closing = msgspec.json.Decoder(_Closing).decode


def encode_draft(event: UsageEvent, offers: Sequence[Estimate]) -> bytes:
    """The bytes of `Reserve.draft`."""
    return _encode(_Draft(event, tuple(offers)))


def encode_event(event: UsageEvent, *, held_nanos: int | None = None, held_credits: int | None = None) -> bytes:
    """The bytes of `Settlement.payload`; `held_*` is what was booked if the hold has been abandoned meanwhile."""
    return _encode(_Closing(event, held_nanos, held_credits))


def read_event(kind: EntryKind, at: int, payload: bytes, *, offer: int | None, cap: int | None) -> UsageEvent:
    """The event of a journal entry. `offer` and `cap` are those granted; `at` is the store's time in ms."""
    if kind is EntryKind.ABANDONED:
        return _abandoned(_decode_draft(payload), at, offer or 0, cap or 0)
    closing = _decode_closing(payload)
    if kind is EntryKind.CORRECTION:
        return _correction(closing)
    return closing.event if closing.event.kind is kind else replace(closing.event, kind=kind)


def _abandoned(draft: _Draft, at: int, offer: int, cap: int) -> UsageEvent:
    estimate = draft.offers[offer]
    return replace(
        draft.event,
        kind=EntryKind.ABANDONED,
        at=at * 1000,
        model=estimate.model or draft.event.model,
        estimated_input_tokens=estimate.input_tokens,
        estimated_output_tokens=cap * estimate.choices,
        cost_nanos=estimate.cost_nanos(cap),
        price_version=estimate.price_version,
        basis=Basis.ABANDONED,
        exact=False,
        success=False,
        error_type="abandoned",
        decision=estimate.decision,
        degraded=estimate.decision == "degrade",
    )


def _correction(closing: _Closing) -> UsageEvent:
    """The row that, added to the abandoned one, makes the truth: its cost is a difference, its tokens are new."""
    event = closing.event
    cost = None if event.cost_nanos is None else event.cost_nanos - (closing.held_nanos or 0)
    credits = None if event.credits is None else event.credits - (closing.held_credits or 0)
    return replace(event, kind=EntryKind.CORRECTION, cost_nanos=cost, credits=credits)

"""What goes into the journal as bytes comes out as the event that the ledger keeps."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from llm_guard_mw.model import EXACT_MAX, Basis, EntryKind, UsageEvent
from llm_guard_mw.stores.journal import Estimate, encode_draft, encode_event, read_event

AT = 1_760_011_200_000

EVENT = UsageEvent(
    "call-1",
    2,
    EntryKind.SETTLE,
    AT * 1000,
    tenant="acme",
    user="alice",
    feature="chat",
    tags={"team": "red"},
    provider="openai",
    requested_model="gpt-4o",
    model="gpt-4o",
    input_tokens=12,
    output_tokens=34,
    estimated_input_tokens=20,
    estimated_output_tokens=256,
    credits=5,
    cost_nanos=400,
    price_version="2026-11",
    basis=Basis.EXACT,
    exact=True,
    duration_ms=900,
    status=200,
    success=True,
    decision="allow",
)
FULL = Estimate("allow", "gpt-4o", 20, 1000, 30, "2026-11")
CHEAPER = Estimate("degrade", "gpt-4o-mini", 21, 100, 3, "2026-12", choices=2)

counts = st.none() | st.integers(0, EXACT_MAX)
names = st.none() | st.text(max_size=30)
events = st.builds(
    UsageEvent,
    call_id=st.text(min_size=1, max_size=40),
    attempt=st.integers(0, 1000),
    kind=st.sampled_from([EntryKind.SETTLE, EntryKind.RELEASE, EntryKind.ORPHAN, EntryKind.REFUSED]),
    at=st.integers(0, EXACT_MAX),
    user=names,
    tenant=names,
    tags=st.dictionaries(st.text(max_size=10), st.text(max_size=10), max_size=4),
    model=names,
    input_tokens=counts,
    output_tokens=counts,
    cost_nanos=st.none() | st.integers(-EXACT_MAX, EXACT_MAX),
    basis=st.none() | st.sampled_from(Basis),
    success=st.none() | st.booleans(),
    decision=st.none() | st.sampled_from(["allow", "cache", "degrade", "reject"]),
    exact=st.booleans(),
    count=st.integers(1, 1000),
)


def closing(event: UsageEvent, kind: EntryKind, **held: int) -> UsageEvent:
    return read_event(kind, AT, encode_event(event, **held), offer=None, cap=None)


def abandoned(event: UsageEvent, *estimates: Estimate, offer: int = 0, cap: int = 0) -> UsageEvent:
    return read_event(EntryKind.ABANDONED, AT + 7, encode_draft(event, estimates), offer=offer, cap=cap)


# ---------------------------------------------------------------- settlements


@given(events)
def test_an_event_comes_back_as_it_was_written(event: UsageEvent) -> None:
    assert closing(event, event.kind) == event


@pytest.mark.parametrize("kind", [EntryKind.SETTLE, EntryKind.RELEASE, EntryKind.ORPHAN, EntryKind.REFUSED])
def test_the_kind_is_what_became_of_it(kind: EntryKind) -> None:
    assert closing(EVENT, kind) == replace(EVENT, kind=kind)


def test_what_was_held_shows_in_corrections_only() -> None:
    assert closing(EVENT, EntryKind.SETTLE, held_nanos=1000, held_credits=9) == EVENT


def test_the_same_event_is_written_as_the_same_bytes() -> None:
    assert encode_event(EVENT, held_nanos=1) == encode_event(replace(EVENT), held_nanos=1)


# ---------------------------------------------------------------- abandoned exchanges


def test_an_abandoned_event_costs_what_the_granted_offer_held() -> None:
    event = abandoned(EVENT, FULL, CHEAPER, offer=1, cap=50)

    assert event.cost_nanos == 100 + 3 * 50
    assert (event.model, event.price_version) == ("gpt-4o-mini", "2026-12")
    assert (event.estimated_input_tokens, event.estimated_output_tokens) == (21, 100)


def test_an_abandoned_event_is_told_by_the_stores_clock() -> None:
    assert abandoned(EVENT, FULL).at == (AT + 7) * 1000


def test_an_abandoned_event_never_claims_to_be_exact() -> None:
    event = abandoned(EVENT, FULL)

    assert (event.kind, event.basis, event.exact) == (EntryKind.ABANDONED, Basis.ABANDONED, False)
    assert (event.success, event.error_type) == (False, "abandoned")


@pytest.mark.parametrize(("estimate", "degraded"), [(FULL, False), (CHEAPER, True)])
def test_an_abandoned_event_says_whether_it_was_degraded(estimate: Estimate, degraded: bool) -> None:
    event = abandoned(EVENT, estimate)

    assert (event.decision, event.degraded) == (estimate.decision, degraded)


def test_an_abandoned_event_without_a_price_has_an_unknown_cost() -> None:
    assert abandoned(EVENT, replace(FULL, fixed_nanos=None), cap=50).cost_nanos is None


def test_an_abandoned_event_keeps_the_drafts_model_where_the_offer_names_none() -> None:
    assert abandoned(EVENT, replace(FULL, model=None)).model == "gpt-4o"


@given(events)
def test_an_abandoned_event_keeps_who_and_what_for(event: UsageEvent) -> None:
    told = abandoned(event, FULL)

    assert (told.call_id, told.attempt, told.user, told.tenant, told.tags) == (
        event.call_id,
        event.attempt,
        event.user,
        event.tenant,
        event.tags,
    )


# ---------------------------------------------------------------- corrections


def test_a_correction_costs_the_difference() -> None:
    event = closing(EVENT, EntryKind.CORRECTION, held_nanos=1000, held_credits=2)

    assert (event.kind, event.cost_nanos, event.credits) == (EntryKind.CORRECTION, -600, 3)


def test_a_correction_brings_the_tokens_that_were_unknown() -> None:
    event = closing(EVENT, EntryKind.CORRECTION, held_nanos=1000)

    assert (event.input_tokens, event.output_tokens) == (12, 34)


def test_a_correction_and_what_it_corrects_add_up_to_the_truth() -> None:
    first = abandoned(EVENT, FULL, cap=50)
    assert first.cost_nanos is not None

    second = closing(EVENT, EntryKind.CORRECTION, held_nanos=first.cost_nanos)

    assert second.cost_nanos is not None
    assert first.cost_nanos + second.cost_nanos == EVENT.cost_nanos


def test_a_correction_without_a_price_has_an_unknown_cost() -> None:
    event = closing(replace(EVENT, cost_nanos=None, credits=None), EntryKind.CORRECTION, held_nanos=1000)

    assert (event.cost_nanos, event.credits) == (None, None)


# ---------------------------------------------------------------- other versions


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b'{"event":{}}', b'{"event":{"call_id":7}}'])
def test_bytes_that_are_no_event_are_an_error_of_one_kind(payload: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        read_event(EntryKind.SETTLE, AT, payload, offer=None, cap=None)


def test_a_field_of_a_newer_version_is_passed_over() -> None:
    payload = encode_event(EVENT).replace(b'{"event":{', b'{"since":3,"event":{"shoe_size":44,', 1)

    assert read_event(EntryKind.SETTLE, AT, payload, offer=None, cap=None) == EVENT


def test_an_entry_of_a_version_that_wrote_every_field_is_read_as_well() -> None:
    said = {name: getattr(EVENT, name) for name in UsageEvent.__struct_fields__}
    payload = msgspec.json.encode({"event": said, "held_nanos": None, "held_credits": 9})

    assert read_event(EntryKind.SETTLE, AT, payload, offer=None, cap=None) == EVENT


def test_what_nobody_knew_takes_no_room_in_the_journal() -> None:
    assert b"null" not in encode_event(EVENT)
    assert b"null" not in encode_draft(EVENT, [FULL])


def test_a_field_that_an_older_version_did_not_write_has_its_default() -> None:
    payload = b'{"event":{"call_id":"c","attempt":1,"kind":"settle","at":5}}'

    assert read_event(EntryKind.SETTLE, AT, payload, offer=None, cap=None) == UsageEvent("c", 1, EntryKind.SETTLE, 5)

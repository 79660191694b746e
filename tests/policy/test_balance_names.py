"""A balance's name is pinned: a changed name resets everyone's limits without a word."""

from __future__ import annotations

import re
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_guard_mw.model import Principal, Tags
from llm_guard_mw.policy import ScopeValues, encode, parse_limit

EVERYTHING = ScopeValues(
    user="alice",
    tenant="acme",
    feature="chat",
    model="gpt-4o",
    key="k1",
    tier="pro",
    workflow="w1",
    session="s1",
    tags={"team": "x"},
)

GOLDEN = {
    ("$2/day per user", "route chat"): "tenant=acme&user=alice|calendar:usd:day:0:UTC:route%20chat",
    ("$2/week per tenant", "all"): "tenant=acme|calendar:usd:week:1:UTC:all",
    ("$500/month global", "all"): "global|calendar:usd:month:1:UTC:all",
    ("40k tokens/minute per user burst 80k", "route /api/chat"): (
        "tenant=acme&user=alice|bucket:tokens:60000:0::route%20%2Fapi%2Fchat"
    ),
    ("20 requests/5 minutes per tenant+feature", "all"): "tenant=acme&feature=chat|bucket:requests:300000:0::all",
    ("9 input tokens/week per model rolling", "all"): "model=gpt-4o|bucket:input_tokens:604800000:0::all",
    ("$5 total per key", "key k1"): "key=k1|total:usd:total:0::key%20k1",
    ("2 concurrent per user", "all"): "tenant=acme&user=alice|concurrent:concurrent::0::all",
    ("9 credits/day per tag:team", "all"): "tenant=acme&tag:team=x|calendar:credits:day:0:UTC:all",
    ("9 output tokens/day per tier", "all"): "tier=pro|calendar:output_tokens:day:0:UTC:all",
    ("9 requests/day per workflow", "all"): "tenant=acme&workflow=w1|calendar:requests:day:0:UTC:all",
    ("9 requests/day per session", "all"): "tenant=acme&user=alice&session=s1|calendar:requests:day:0:UTC:all",
    ("9 requests/day per tag:team+session+model+key", "all"): (
        "tenant=acme&user=alice&key=k1&model=gpt-4o&session=s1&tag:team=x|calendar:requests:day:0:UTC:all"
    ),
}


@pytest.mark.parametrize(("limit", "name"), GOLDEN.items())
def test_names_of_balances_never_change(limit: tuple[str, str], name: str) -> None:
    text, place = limit

    assert parse_limit(text, place=place).balance(EVERYTHING) == name


def test_the_timezone_and_anchor_of_a_budget_are_in_its_name() -> None:
    limit = parse_limit({"limit": "$2/month per user", "anchor": 15, "timezone": "Europe/Berlin"})

    assert limit.balance(EVERYTHING) == "tenant=acme&user=alice|calendar:usd:month:15:Europe%2FBerlin:all"


def test_what_is_missing_counts_under_one_shared_name_that_no_value_can_take() -> None:
    limit = parse_limit("$2/day per user+tag:team")

    nobody = limit.balance(ScopeValues())
    pretender = limit.balance(ScopeValues(user="*none", tenant="*none", tags={"team": "*none"}))

    assert nobody == "tenant=*none&user=*none&tag:team=*none|calendar:usd:day:0:UTC:all"
    assert pretender == "tenant=%2Anone&user=%2Anone&tag:team=%2Anone|calendar:usd:day:0:UTC:all"


def test_an_edit_of_amount_burst_parts_or_condition_keeps_the_balance() -> None:
    edits = [
        "$2/day per user",
        "$7/day per user",
        {"limit": "$2/day per user", "hard": 1.2},
        {"limit": "$2/day per user", "when": {"tier": "free"}},
    ]

    assert len({parse_limit(edit).balance(EVERYTHING) for edit in edits}) == 1


@given(st.text())
def test_an_encoded_value_is_plain_and_says_the_same(value: str) -> None:
    assert re.fullmatch(r"([A-Za-z0-9._-]|%[0-9A-F]{2})*", encode(value))
    assert unquote(encode(value)) == value


@given(user=st.text(), tenant=st.none() | st.text(), other=st.text(), other_tenant=st.none() | st.text())
def test_two_different_callers_never_share_a_name(
    user: str, tenant: str | None, other: str, other_tenant: str | None
) -> None:
    limit = parse_limit("$2/day per user")

    names = limit.balance(ScopeValues(user=user, tenant=tenant)), limit.balance(ScopeValues(other, other_tenant))

    assert (names[0] == names[1]) == ((user, tenant) == (other, other_tenant))


def test_bytes_that_are_no_characters_get_a_name_of_their_own() -> None:
    header = b"user-\xff".decode("utf-8", "surrogateescape")

    assert encode(header) != encode("user-\ufffd")


def test_untrusted_tags_stand_for_nothing() -> None:
    tags = Tags(feature="f", tier="t", workflow_id="w", session_id="s", experiment="e", free=(("team", "x"),))

    assert ScopeValues.of(Principal("alice"), tags) == ScopeValues(user="alice")


def test_trusted_tags_stand_for_what_nobody_else_has_said() -> None:
    tags = Tags("f", "t", "w", "s", "e", "v", (("team", "x"),), trusted=True)

    values = ScopeValues.of(Principal("alice", tier="pro"), tags, feature="chat")

    assert (values.tier, values.feature, values.workflow, values.session) == ("pro", "chat", "w", "s")
    assert dict(values.tags) == {"team": "x", "experiment": "e", "variant": "v"}

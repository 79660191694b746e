"""X-Metering-Tags: what is understood, what is bounded, and that it is never an error."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from llm_guard_mw.http import HttpRequest
from llm_guard_mw.identity import read_tags
from llm_guard_mw.model import Tags


def tagged(*values: bytes | dict) -> HttpRequest:
    lines = (value if isinstance(value, bytes) else json.dumps(value).encode() for value in values)
    return HttpRequest("POST", "/", headers=tuple((b"x-metering-tags", line) for line in lines))


def test_known_names_are_understood_and_the_rest_is_free_and_sorted():
    document = {
        "feature": "summarizer",
        "user_tier": "free",
        "workflow_id": "w1",
        "session_id": "s1",
        "experiment": "e1",
        "variant": "b",
        "team": "x",
        "env": "prod",
    }

    assert read_tags(tagged(document), trusted=True) == Tags(
        feature="summarizer",
        tier="free",
        workflow_id="w1",
        session_id="s1",
        experiment="e1",
        variant="b",
        free=(("env", "prod"), ("team", "x")),
        trusted=True,
    )


def test_tier_is_another_name_of_user_tier():
    assert read_tags(tagged({"tier": "free"}), trusted=False).tier == "free"
    assert read_tags(tagged({"tier": "free", "user_tier": "pro"}), trusted=False).tier == "pro"


def test_without_the_header_there_are_no_tags_and_no_line():
    with capture_logs() as logs:
        tags = read_tags(HttpRequest("POST", "/"), trusted=True)

    assert tags == Tags(trusted=True)
    assert logs == []


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"team": 7}, "a value is not a string"),
        ({"team": True}, "a value is not a string"),
        ({"team": None}, "a value is not a string"),
        ({"team": {"a": "b"}}, "a value is not a string"),
        ({"team": ""}, "a value is empty or holds a NUL"),
        ({"team": "a\0"}, "a value is empty or holds a NUL"),
        ({"team": "é" * 129}, "a value is longer than 256 bytes"),
        ({"te am": "x"}, "a name is not 1 to 64 of A-Z a-z 0-9 _ . -"),
        ({"t" * 65: "x"}, "a name is not 1 to 64 of A-Z a-z 0-9 _ . -"),
        ({"team\n": "x"}, "a name is not 1 to 64 of A-Z a-z 0-9 _ . -"),
        ({"": "x"}, "a name is not 1 to 64 of A-Z a-z 0-9 _ . -"),
    ],
)
def test_a_tag_that_cannot_be_used_is_left_out_and_the_others_stay(document, reason):
    with capture_logs() as logs:
        tags = read_tags(tagged({**document, "env": "prod"}), trusted=True)

    assert tags == Tags(free=(("env", "prod"),), trusted=True)
    assert [(line["event"], line["reasons"]) for line in logs] == [("metering_tags_dropped", [reason])]


@pytest.mark.parametrize(
    "values",
    [
        (b"",),
        (b"feature=chat",),
        (b'["feature"]',),
        (b'"feature"',),
        (b'{"feature": "\\ud800"}',),
        (b"\xff",),
        (b"[" * 4000,),
        (b'{"a":"' + b"x" * 4096 + b'"}',),
        (b'{"feature":"a"}', b'{"feature":"b"}'),
    ],
)
def test_a_header_that_cannot_be_read_is_ignored_with_one_line(values):
    with capture_logs() as logs:
        tags = read_tags(tagged(*values), trusted=False)

    assert tags == Tags()
    assert len(logs) == 1
    assert logs[0]["log_level"] == "debug"


def test_more_than_sixteen_tags_are_cut_to_the_first_sixteen():
    tags = read_tags(tagged({f"t{n:02}": "x" for n in range(20)}), trusted=True)

    assert [name for name, _ in tags.free] == [f"t{n:02}" for n in range(16)]


def test_the_line_names_the_reason_and_no_value():
    with capture_logs() as logs:
        read_tags(tagged({"te am": "a secret", "team": 7}), trusted=True)

    assert "secret" not in str(logs)
    assert logs[0]["log_level"] == "warning"


@given(
    st.binary(max_size=200)
    | st.dictionaries(st.text(), st.text() | st.integers()).map(lambda d: json.dumps(d).encode())
)
def test_no_header_is_ever_an_error(value):
    tags = read_tags(tagged(value), trusted=False)

    assert len(tags.free) <= 16
    assert not tags.trusted

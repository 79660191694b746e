"""Where names come from: scope, session, state, header, cookie, callable; and what an id may look like."""

import asyncio
import enum
import sys
import types
import uuid
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.authentication import SimpleUser, UnauthenticatedUser
from starlette.datastructures import State
from structlog.testing import capture_logs

from llm_guard_mw.errors import ConfigError, IdentityError
from llm_guard_mw.http import HttpRequest
from llm_guard_mw.identity import (
    Identifier,
    IdentityRules,
    JWTRules,
    Late,
    Source,
    identity_mistakes,
    parse_proxy,
    parse_source,
)
from llm_guard_mw.model import Principal


def rules(*user: str, **more) -> IdentityRules:
    return IdentityRules(**{"user": user, "tenant": (), "tier": (), **more})


def request(*headers: tuple[bytes, bytes], peer=("10.0.0.9", 4711), **surroundings) -> HttpRequest:
    return HttpRequest("POST", "/api/chat", headers=headers, peer=peer, surroundings=surroundings)


def user_of(source: str, **surroundings) -> str | None:
    found = Identifier(rules(source)).identify(request(**surroundings))
    return None if isinstance(found, Late) else found.user


@pytest.fixture
def app(monkeypatch):
    """A module of the app, as `module:callable` finds it."""
    module = types.ModuleType("app_of_the_test")
    monkeypatch.setitem(sys.modules, "app_of_the_test", module)
    return module


# ---------------------------------------------------------------- scope, session, state


@pytest.mark.parametrize(
    ("source", "surroundings"),
    [
        ("scope:user.id", {"user": {"id": "alice"}}),
        ("scope:user.id", {"user": SimpleNamespace(id="alice")}),
        ("scope:user.identity", {"user": SimpleUser("alice")}),
        ("scope:user.profile.id", {"user": SimpleNamespace(profile={"id": "alice"})}),
        ("scope:REMOTE_USER", {"REMOTE_USER": "alice"}),
        ("scope:beaker.session.uid", {"beaker.session": {"uid": "alice"}}),
        ("session:user_id", {"session": {"user_id": "alice"}}),
        ("session:user.id", {"session": {"user": {"id": "alice"}}}),
        ("state:user", {"state": {"user": "alice"}}),
        ("state:user.id", {"state": State({"user": SimpleNamespace(id="alice")})}),
    ],
)
def test_a_path_leads_through_keys_and_attributes(source, surroundings):
    assert user_of(source, **surroundings) == "alice"


@pytest.mark.parametrize(
    ("source", "surroundings"),
    [
        ("scope:user.id", {}),
        ("scope:user.id", {"user": None}),
        ("scope:user.id", {"user": {}}),
        ("scope:user.id", {"user": {"id": None}}),
        ("scope:user.identity", {"user": UnauthenticatedUser()}),
        ("scope:user", {"user": UnauthenticatedUser()}),
        ("scope:user.pk", {"user": SimpleNamespace(is_authenticated=False, pk="0")}),
        ("session:user_id", {}),
        ("session:user_id", {"session": {}}),
        ("state:user", {"state": State()}),
    ],
)
def test_a_path_that_leads_nowhere_is_no_answer_yet(source, surroundings):
    assert isinstance(Identifier(rules(source)).identify(request(**surroundings)), Late)


def test_a_user_that_cannot_be_read_is_no_answer_and_is_said_once():
    class Lazy:
        @property
        def id(self) -> str:
            raise RuntimeError("the database is away")

    identifier = Identifier(rules("scope:user.id"))

    with capture_logs() as logs:
        found = [identifier.identify(request(user=Lazy())) for _ in range(3)]

    assert all(isinstance(one, Late) for one in found)
    assert [(line["event"], line["source"], line["error"]) for line in logs] == [
        ("identity_source_failed", "scope:user.id", "RuntimeError")
    ]


# ---------------------------------------------------------------- ids


class Colour(enum.StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (7, "7"),
        (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        ("Zoë 😀 名前", "Zoë 😀 名前"),
        ("a\r\nb|c/d%00", "a\r\nb|c/d%00"),
        ('{"device_id":"x"}', '{"device_id":"x"}'),
        (Colour.RED, "red"),
        ("x" * 256, "x" * 256),
    ],
)
def test_an_id_is_kept_as_it_is(value, told):
    assert user_of("session:id", session={"id": value}) == told


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("", "empty"),
        (b"", "empty"),
        ("x" * 257, "longer than 256 bytes"),
        ("é" * 129, "longer than 256 bytes"),
        ("\ud800", "not valid Unicode"),
        (b"\xff", "not valid UTF-8"),
        ("a\0b", "NUL"),
        (True, "is a bool"),
        (1.5, "is a float"),
        (["alice"], "is a list"),
    ],
)
def test_a_bad_id_is_refused_and_its_source_named_but_not_its_value(value, problem):
    with pytest.raises(IdentityError, match=rf"^session:id: .*{problem}") as caught:
        user_of("session:id", session={"id": value})

    if isinstance(value, str) and len(value) > 10:
        assert value not in str(caught.value)


def test_ids_that_look_alike_stay_apart():
    composed, decomposed = "Zo\u00eb", "Zoe\u0308"

    assert user_of("session:id", session={"id": composed}) != user_of("session:id", session={"id": decomposed})


@given(st.text(min_size=1, max_size=60).filter(lambda text: "\0" not in text))
def test_any_text_is_an_id_and_none_becomes_another(text):
    assert user_of("session:id", session={"id": text}) == text


@pytest.mark.parametrize(("anonymous", "name"), [("ip", "ip:203.0.113.7"), ("shared", "anonymous")])
def test_a_proven_id_cannot_pose_as_an_anonymous_caller(anonymous, name):
    identifier = Identifier(rules("session:id", anonymous=anonymous))

    with pytest.raises(IdentityError, match="anonymous caller"):
        identifier.identify(request(session={"id": name}))


# ---------------------------------------------------------------- order


def test_the_first_source_that_answers_wins():
    identifier = Identifier(rules("session:id", "state:id", "scope:id"))

    assert identifier.identify(request(state={"id": "second"}, id="third")) == Principal(user="second")


def test_a_bad_answer_ends_the_search():
    identifier = Identifier(rules("session:id", "state:id"))

    with pytest.raises(IdentityError, match="session:id"):
        identifier.identify(request(session={"id": ""}, state={"id": "alice"}))


def test_user_tenant_and_tier_have_sources_of_their_own():
    identifier = Identifier(IdentityRules(user=("scope:u",), tenant=("scope:t",), tier=("scope:p",)))

    assert identifier.identify(request(u="alice", t="acme", p="free")) == Principal("alice", "acme", "free")


def test_a_tenant_alone_will_do_where_no_user_is_asked_for():
    identifier = Identifier(IdentityRules(user=(), tenant=("cookie:org",), tier=()))

    assert identifier.identify(request((b"cookie", b"org=acme"))) == Principal(tenant="acme")
    with pytest.raises(IdentityError, match="cookie:org"):
        identifier.identify(request())


def test_without_any_source_the_anonymous_rule_decides():
    with pytest.raises(IdentityError, match="none is configured"):
        Identifier(rules()).identify(request())

    assert Identifier(rules(anonymous="shared")).identify(request()) == Principal(user="anonymous", anonymous=True)


# ---------------------------------------------------------------- cookies


@pytest.mark.parametrize(
    "header", [b"uid=alice", b"a=b; uid=alice; c=d", b'uid="alice"', b"uid=alice; uid=alice", b" uid=alice ;"]
)
def test_a_cookie_is_read_by_its_name(header):
    assert Identifier(rules("cookie:uid")).identify(request((b"cookie", header))).user == "alice"


def test_cookies_may_come_in_several_headers():
    split = request((b"cookie", b"a=b"), (b"cookie", b"uid=alice"))

    assert Identifier(rules("cookie:uid")).identify(split).user == "alice"


def test_two_cookies_of_one_name_that_differ_are_refused():
    with pytest.raises(IdentityError, match=r"cookie:uid.*more than once"):
        Identifier(rules("cookie:uid")).identify(request((b"cookie", b"uid=alice; uid=mallory")))


# ---------------------------------------------------------------- callables


def test_a_sync_callable_is_asked_with_the_request(app):
    app.who = lambda asked: asked.header(b"x-session").decode()

    found = Identifier(rules("app_of_the_test:who")).identify(request((b"x-session", b"alice")))

    assert found == Principal(user="alice")


def test_a_callable_may_stand_on_an_object(app):
    app.auth = SimpleNamespace(who=lambda asked: 7)

    assert Identifier(rules("app_of_the_test:auth.who")).identify(request()).user == "7"


def test_the_async_face_awaits_an_async_callable_and_calls_a_sync_one(app):
    async def user(asked):
        await asyncio.sleep(0)
        return "alice"

    app.user, app.tenant = user, lambda asked: "acme"
    identifier = Identifier(rules("app_of_the_test:user", tenant=("app_of_the_test:tenant",)))

    assert asyncio.run(identifier.aidentify(request())) == Principal("alice", "acme")


def test_an_async_callable_is_refused_at_once_by_a_door_without_a_loop(app):
    async def who(asked):
        return "alice"

    app.who = who

    with pytest.raises(ConfigError, match="app_of_the_test:who is async"):
        Identifier(rules("app_of_the_test:who"), sync_only=True)


def test_the_sync_face_never_runs_an_async_callable(app):
    async def who(asked):
        return "alice"

    app.who = lambda asked: who(asked)  # cannot be told from its signature

    with pytest.raises(ConfigError, match="is async"):
        Identifier(rules("app_of_the_test:who"), sync_only=True).identify(request())


def test_a_callable_that_fails_lets_nobody_in_and_keeps_its_words_to_itself(app):
    def who(asked):
        raise KeyError("secret of the session")

    app.who = who
    identifier = Identifier(rules("app_of_the_test:who", "session:id"))

    with capture_logs() as logs, pytest.raises(IdentityError, match="could not be asked") as caught:
        identifier.identify(request(session={"id": "alice"}))

    assert caught.value.retry_after_seconds == 1
    assert "secret" not in str(logs) + str(caught.value)


def test_a_callable_may_refuse_in_its_own_words(app):
    async def who(asked):
        raise IdentityError("your session was revoked")

    app.who = who

    with pytest.raises(IdentityError, match="your session was revoked") as caught:
        asyncio.run(Identifier(rules("app_of_the_test:who")).aidentify(request()))

    assert caught.value.retry_after_seconds is None


def test_callables_that_cannot_be_found_are_all_named(app):
    app.number = 7

    with pytest.raises(ConfigError) as caught:
        Identifier(rules("no_such_module_here:who", "app_of_the_test:who", "app_of_the_test:number"))

    first, second, third = map(str, caught.value.mistakes)
    assert "cannot be imported" in first
    assert '"who" is not there' in second
    assert "is a int, which cannot be called" in third


# ---------------------------------------------------------------- late


def test_late_is_settled_once_the_app_has_authenticated_its_caller():
    identifier = Identifier(rules("scope:user.id"))
    scope: dict = {}
    arriving = HttpRequest("POST", "/", surroundings=scope)

    before = identifier.identify(arriving)
    scope["user"] = SimpleNamespace(id="alice")
    after = identifier.settle_late(arriving)

    assert isinstance(before, Late)
    assert "scope:user.id" in before.reason
    assert after == Principal(user="alice")


def test_late_that_stays_unknown_is_an_identity_error():
    identifier = Identifier(rules("scope:user.id"))

    with pytest.raises(IdentityError, match=r"scope:user\.id"):
        identifier.settle_late(request())


@pytest.mark.parametrize(("anonymous", "user"), [("shared", "anonymous"), ("ip", "ip:10.0.0.9")])
def test_late_comes_before_anonymous_and_ends_there(anonymous, user):
    identifier = Identifier(rules("scope:user.id", anonymous=anonymous))

    assert isinstance(identifier.identify(request()), Late)
    assert identifier.settle_late(request()) == Principal(user=user, anonymous=True)


def test_the_async_face_settles_late_with_an_async_callable(app):
    known: list[str] = []

    async def who(asked):
        return known[0] if known else None

    app.who = who
    identifier = Identifier(rules("app_of_the_test:who"))

    async def story():
        before = await identifier.aidentify(request())
        known.append("alice")
        return before, await identifier.asettle_late(request())

    before, after = asyncio.run(story())
    assert isinstance(before, Late)
    assert after == Principal(user="alice")


def test_a_tenant_that_the_app_fills_in_is_waited_for_and_the_user_is_told_meanwhile():
    identifier = Identifier(rules("cookie:uid", tenant=("scope:user.org",)))

    found = identifier.identify(request((b"cookie", b"uid=alice")))

    assert isinstance(found, Late)
    assert found.known == Principal(user="alice")


def test_a_callable_that_knows_no_tenant_for_a_known_user_has_answered(app):
    app.tenant = lambda asked: None
    identifier = Identifier(rules("cookie:uid", tenant=("app_of_the_test:tenant",)))

    assert identifier.identify(request((b"cookie", b"uid=alice"))) == Principal(user="alice")


def test_nobody_waits_for_the_tenant_of_an_unknown_user():
    identifier = Identifier(rules("cookie:uid", tenant=("scope:user.org",)))

    with pytest.raises(IdentityError, match="cookie:uid"):
        identifier.identify(request())


def test_the_defaults_ask_scope_late_and_leave_jwt_out():
    found = Identifier(IdentityRules()).identify(request((b"authorization", b"Bearer a.b.c")))

    assert isinstance(found, Late)


# ---------------------------------------------------------------- notation


def test_sources_are_parsed_into_kind_and_name():
    assert parse_source("header:X-User-Id") == Source("header", "x-user-id", "header:X-User-Id")
    assert parse_source("scope:user.id") == Source("scope", "user.id", "scope:user.id")
    assert parse_source("jwt:https://example.com/org").name == "https://example.com/org"
    assert parse_source("app.auth:who") == Source("callable", "who", "app.auth:who")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sub", "write KIND:NAME"),
        ("jwt:", "write KIND:NAME"),
        (":sub", "write KIND:NAME"),
        ("header:x user", '"x user" in "header:x user" is not the name of a header'),
        ("cookie:a=b", "is not the name of a cookie"),
        ("scope:user..id", "has an empty step"),
        ("headers:x-user-id", '"headers" in "headers:x-user-id" is neither a kind of source'),
    ],
)
def test_a_source_that_cannot_be_read_says_which_piece_is_wrong(text, problem):
    with pytest.raises(ValueError, match=problem.replace(".", r"\.")):
        parse_source(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("10.0.0.1/8", 'write "10.0.0.0/8"'), ("*", "is neither an address"), ("proxy.internal", "is neither an address")],
)
def test_a_proxy_that_cannot_be_read_says_what_would_be_right(text, problem):
    with pytest.raises(ValueError, match=problem):
        parse_proxy(text)


def test_all_mistakes_are_found_in_one_go():
    wrong = IdentityRules(
        user=("sub",),
        tenant=("jwt:organisation",),
        trusted_proxies=("10.0.0.1/8",),
        anonymous="maybe",  # type: ignore[arg-type]
    )

    assert [mistake.where for mistake in identity_mistakes(wrong)] == [
        "identity.user[0]",
        "identity.tenant[0]",
        "identity.trusted_proxies[0]",
        "identity.anonymous",
    ]
    with pytest.raises(ConfigError):
        Identifier(wrong)


def test_the_defaults_are_no_mistake():
    assert identity_mistakes(IdentityRules()) == []
    assert identity_mistakes(IdentityRules(jwt=JWTRules(key="k" * 32, algorithms=("HS256",)))) == []

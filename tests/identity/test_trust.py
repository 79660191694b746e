"""Whose headers count: trusted proxies, judged on the peer; and where an anonymous caller comes from."""

import asyncio

import pytest
from structlog.testing import capture_logs
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from llm_guard_mw.errors import IdentityError
from llm_guard_mw.http import HttpRequest, strip
from llm_guard_mw.identity import Identifier, IdentityRules
from llm_guard_mw.model import Principal

PROXY = ("10.0.0.2", 40_000)
STRANGER = ("203.0.113.7", 40_000)


def identifier(*trusted: str, **more) -> Identifier:
    fields = {"user": ("header:x-user-id",), "tenant": (), "tier": (), "trusted_proxies": trusted, **more}
    return Identifier(IdentityRules(**fields))


def request(peer, *headers: tuple[bytes, bytes], **surroundings) -> HttpRequest:
    return HttpRequest("POST", "/", headers=headers, peer=peer, surroundings=surroundings)


ALICE = (b"x-user-id", b"alice")


def test_a_trusted_proxy_names_the_user():
    assert identifier("10.0.0.0/8").identify(request(PROXY, ALICE)) == Principal(user="alice")


@pytest.mark.parametrize("trusted", [(), ("10.0.0.0/8",)])
def test_a_stranger_names_nobody_and_is_told_that_its_header_does_not_count(trusted):
    with pytest.raises(IdentityError, match="trusted_proxies only"):
        identifier(*trusted).identify(request(STRANGER, ALICE))


def test_what_a_stranger_poses_as_is_stripped_in_every_spelling():
    headers = (ALICE, (b"x_user_id", b"alice"), (b"x-user_id", b"alice"), (b"accept", b"*/*"))
    arriving = request(STRANGER, *headers)

    names = identifier("10.0.0.0/8").headers_to_strip(arriving)

    assert strip(arriving.headers, names) == ((b"accept", b"*/*"),)


def test_what_a_trusted_proxy_says_is_not_stripped():
    assert identifier("10.0.0.0/8").headers_to_strip(request(PROXY, ALICE)) == frozenset()


@pytest.mark.parametrize(
    ("trusted", "peer"),
    [
        ("10.0.0.2", ("10.0.0.2", 1)),
        ("10.0.0.0/8", ("::ffff:10.0.0.2", 1)),
        ("2001:db8::/32", ("2001:db8::7", 1)),
        ("10.0.0.2", ("10.0.0.2", -1)),
    ],
)
def test_a_peer_is_trusted_by_address_or_network(trusted, peer):
    assert identifier(trusted).trusted(request(peer))


@pytest.mark.parametrize("peer", [STRANGER, ("2001:db8::7", 1), ("testclient", 50_000), ("", 1), None])
def test_any_other_peer_is_not(peer):
    assert not identifier("10.0.0.0/8").trusted(request(peer))


def test_a_unix_socket_is_trusted_where_the_rules_say_so():
    over_socket = request(None, server=("/run/app.sock", None))

    assert identifier("unix").trusted(over_socket)
    assert not identifier("10.0.0.0/8").trusted(over_socket)


def test_a_peer_without_address_on_a_port_is_no_unix_socket():
    assert not identifier("unix").trusted(request(None, server=("127.0.0.1", 8000)))


def test_a_header_that_stands_there_twice_is_refused():
    with pytest.raises(IdentityError, match="more than once"):
        identifier("10.0.0.0/8").identify(request(PROXY, ALICE, (b"x-user-id", b"mallory")))


def test_a_header_of_bytes_that_are_no_text_is_refused():
    with pytest.raises(IdentityError, match="not valid UTF-8"):
        identifier("10.0.0.0/8").identify(request(PROXY, (b"x-user-id", b"\xff\xfe")))


# ---------------------------------------------------------------- rewritten peers


def rewritten_by_uvicorn(forwarded_for: bytes) -> HttpRequest:
    """What uvicorn makes of a request whose X-Forwarded-For it believes from anybody."""
    seen = {}

    async def app(scope, receive, send):
        seen.update(scope)

    scope = {"type": "http", "client": STRANGER, "headers": [(b"x-forwarded-for", forwarded_for), ALICE]}
    asyncio.run(ProxyHeadersMiddleware(app, trusted_hosts="*")(scope, None, None))
    return HttpRequest("POST", "/", headers=tuple(seen["headers"]), peer=seen["client"], surroundings=seen)


@pytest.mark.parametrize(
    "forwarded_for",
    [b"10.0.0.2", b"10.0.0.2:4711", b"10.0.0.2:04711", b"[2001:db8::7]:4711", b"2001:db8::7", b"10.0.0.2:1, 8.8.8.8"],
)
def test_an_address_that_the_server_took_from_a_header_is_never_believed(forwarded_for):
    arriving = rewritten_by_uvicorn(forwarded_for)
    guard = identifier("10.0.0.0/8", "2001:db8::/32")

    with capture_logs() as logs, pytest.raises(IdentityError):
        guard.identify(arriving)

    assert arriving.peer != STRANGER
    assert guard.headers_to_strip(arriving) == {b"x-user-id"}
    assert [line["event"] for line in logs] == ["peer_address_rewritten"]


def test_the_warning_of_a_rewritten_address_comes_once():
    guard = identifier("10.0.0.0/8")

    with capture_logs() as logs:
        for _ in range(3):
            guard.trusted(rewritten_by_uvicorn(b"10.0.0.2"))

    assert len(logs) == 1


def test_nothing_is_said_of_a_rewritten_address_that_nobody_relies_on():
    with capture_logs() as logs:
        assert not identifier().trusted(rewritten_by_uvicorn(b"10.0.0.2"))

    assert logs == []


# ---------------------------------------------------------------- anonymous by address


def anonymous(peer, *headers, trusted=("10.0.0.0/8",)) -> str | None:
    found = identifier(*trusted, user=(), anonymous="ip").identify(request(peer, *headers))
    assert found.anonymous
    return found.user


@pytest.mark.parametrize(
    ("peer", "user"),
    [
        (STRANGER, "ip:203.0.113.7"),
        (("::ffff:203.0.113.7", 1), "ip:203.0.113.7"),
        (("2001:db8:1:2:3:4:5:6", 1), "ip:2001:db8:1:2::/64"),
        (("2001:db8:1:2:ffff::1", 1), "ip:2001:db8:1:2::/64"),
        (("testclient", 50_000), "ip:testclient"),
        (None, "ip:unknown"),
        (("203.0.113.7", 0), "ip:unknown"),
    ],
)
def test_an_anonymous_caller_is_counted_by_address_ipv6_by_its_64(peer, user):
    assert anonymous(peer) == user


@pytest.mark.parametrize(
    ("forwarded_for", "user"),
    [
        (b"203.0.113.7", "ip:203.0.113.7"),
        (b"1.1.1.1, 203.0.113.7", "ip:203.0.113.7"),
        (b"203.0.113.7, 10.9.9.9", "ip:203.0.113.7"),
        (b"203.0.113.7:4711", "ip:203.0.113.7"),
        (b"[2001:db8:1:2::3]:4711", "ip:2001:db8:1:2::/64"),
        (b"203.0.113.7, unknown", "ip:10.0.0.2"),
        (b"10.1.1.1, 10.9.9.9", "ip:10.1.1.1"),
        (b"", "ip:10.0.0.2"),
    ],
)
def test_behind_a_trusted_proxy_the_nearest_address_that_is_not_one_counts(forwarded_for, user):
    assert anonymous(PROXY, (b"x-forwarded-for", forwarded_for)) == user


def test_a_stranger_cannot_choose_its_address():
    assert anonymous(STRANGER, (b"x-forwarded-for", b"1.1.1.1")) == "ip:203.0.113.7"


def test_shared_makes_one_caller_of_all():
    guard = identifier(user=(), anonymous="shared")

    assert guard.identify(request(STRANGER)) == guard.identify(request(PROXY)) == Principal("anonymous", anonymous=True)

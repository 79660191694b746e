"""Which servers the Redis store works with, what it asks of them, and whom it tells."""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_guard_mw.errors import ConfigError, StoreUnavailable
from llm_guard_mw.stores import open_store
from llm_guard_mw.stores.protocol import Granted
from llm_guard_mw.stores.redis import RedisStore
from llm_guard_mw.stores.redis_address import Address, read_url
from tests.model import servers
from tests.model.world import MINUTE, concurrent, dollars, offer, prepaid, requests, settled, tokens, wish
from tests.stores.faulty_proxy import FaultyProxy

HOW_TO = Path(__file__).parents[2] / "docs/how-to/redis.md"


def through_a_day(store: RedisStore) -> None:
    """Each verb once, sync; the async face in the end."""
    assert store.journal_length() == 0
    wished = wish("c/1", offer(prepaid("pot", 10, 1), tokens("tpm", 10, 1), requests("rpm", 9), concurrent("calls", 2)))
    held = store.reserve(wished)
    assert isinstance(held, Granted)
    assert isinstance(store.reserve(wish("c/2", offer(prepaid("pot", 10, 1)), takes="c/1")), Granted)
    store.renew(["c/2"], ["c"], MINUTE)
    store.settle(settled("c/1", held))
    store.reserve(wish("d/1", offer(prepaid("pot", 10, 1)), lease_ms=-MINUTE))
    assert store.expire() == 1
    store.append("r/1/refused", b"{}")
    store.close_call("c")
    assert store.admit("tenant=acme", "tag:team", "red", 20_000, 5)
    assert {state.balance for state in store.balances("", 10)} == {"pot", "tpm", "rpm"}
    assert store.peek(["pot"])
    assert len(store.holds("", 10)) == 1
    entries = store.read_journal("", 10)
    store.take_journal("a", 10)
    store.take_journal("b", 10, idle_ms=0)
    store.drop_journal([entry.position for entry in entries])
    store.attend(1000)
    store.attended()
    store.attend(0)
    assert store.epoch()
    store.forget()
    assert store.now()

    async def once() -> object:
        return await store.async_face().reserve(wish("e/1", offer(prepaid("pot", 10, 1))))

    assert isinstance(asyncio.run(once()), Granted)


# ---------------------------------------------------------------- what a server has to be


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_server_that_evicts_is_refused(server: servers.Server, policy: str) -> None:
    store = RedisStore(server.url)
    with server.client() as client:
        client.config_set("maxmemory-policy", policy)
        try:
            with pytest.raises(ConfigError, match=rf"maxmemory-policy is '{policy}'.*noeviction"):
                store.journal_length()
            with pytest.raises(ConfigError, match=policy):
                asyncio.run(store.async_face().close_call("c"))
            with pytest.raises(ConfigError, match=policy):  # as soon as Redis has rested, it is asked again
                store.now()
        finally:
            client.config_set("maxmemory-policy", "noeviction")
    store.close()


def test_a_server_older_than_6_2_is_refused(proxy: FaultyProxy) -> None:
    proxy.faults.replace = b"redis_version:7.2", b"redis_version:5.0"
    store = RedisStore(proxy.url)

    with pytest.raises(ConfigError, match=r"is Redis 5\.0.*6\.2 is the oldest"):
        store.journal_length()

    store.close()


def test_contents_of_another_version_are_refused(server: servers.Server) -> None:
    with server.client() as client:
        client.hset("llm_guard:{p00}:meta", "schema", "9")
    store = RedisStore(server.url)

    with pytest.raises(ConfigError, match="schema 9, this version of llm_guard_mw knows 1"):
        store.journal_length()

    store.close()


def test_the_log_says_which_server_it_is_and_that_it_keeps_nothing_on_disk(
    server: servers.Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "llm_guard")
    store = RedisStore(server.url)

    store.journal_length()

    assert re.search(r'"server":"Valkey 9\.', caplog.text)
    assert '"event":"redis_without_persistence"' in caplog.text
    store.close()


def test_a_clock_far_from_ours_is_told_and_followed(
    server: servers.Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_guard_mw.stores import redis_steps

    store = RedisStore(server.url)
    ours = redis_steps.wall_clock_ms
    for module in ("redis_steps", "redis_fitness"):
        monkeypatch.setattr(f"llm_guard_mw.stores.{module}.wall_clock_ms", lambda: ours() - 5000)

    held = store.reserve(wish("c/1", offer(prepaid("pot", 10, 1)), not_after=store.clock() + 60_000))

    assert '"event":"redis_clock_skew"' in caplog.text
    assert isinstance(held, Granted)
    assert abs(store.clock() - held.at) < 1000
    store.close()


@pytest.mark.parametrize("leg", servers.LEGS)
def test_each_server_does_all_verbs_by_its_own_clock(leg: str) -> None:
    if reason := servers.missing(leg):
        pytest.skip(reason)
    store = RedisStore(servers.emptied(leg).url)

    through_a_day(store)

    store.close()


def test_the_endings_and_the_subjects_have_a_ttl_and_the_holds_have_none(server: servers.Server) -> None:
    store = RedisStore(server.url)
    at = store.now()
    windows = dollars("x", 1).windows  # long over: the store says so
    assert not isinstance(store.reserve(wish("z/1", offer(dollars("day", 9, 1, windows=windows)))), Granted)
    held = store.reserve(wish("c/1", offer(tokens("user=a|bucket", 10, 1), prepaid("user=b|total", 10, 1))))
    assert isinstance(held, Granted)

    with server.client() as client:
        assert client.pttl("llm_guard:{p00}:x:c/1") == -1
        store.settle(settled("c/1", held))
        assert 290_000 < client.pttl("llm_guard:{p00}:x:c/1") <= 300_000
        assert client.pttl("llm_guard:{p00}:b:user=a") > 86_400_000
        assert client.pttl("llm_guard:{p00}:b:user=b") == -1
    assert at <= held.at
    store.close()


def test_the_ttl_of_a_subject_is_never_below_the_longest_fill_time(server: servers.Server) -> None:
    """A bucket of ten a day that is full for a hundred days still knows so tomorrow."""
    store = RedisStore(server.url)
    day = 86_400_000

    store.reserve(wish("c/1", offer(tokens("u|slow", 1000, 1000, rate=10, period=day), tokens("u|fast", 10, 1))))

    with server.client() as client:
        assert client.pttl("llm_guard:{p00}:b:u") > 100 * day
        store.reserve(wish("c/2", offer(tokens("u|fast", 10, 1))))
        assert client.pttl("llm_guard:{p00}:b:u") > 100 * day
    store.close()


# ---------------------------------------------------------------- who we are there


@pytest.fixture(params=servers.LEGS)
def careful(request: pytest.FixtureRequest) -> Iterator[str]:
    """A URL of the user that docs/how-to/redis.md tells to make."""
    if reason := servers.missing(request.param):
        pytest.skip(reason)
    server = servers.emptied(request.param)
    rules = re.search(r"^ACL SETUSER guard (.+)$", HOW_TO.read_text("utf-8"), re.MULTILINE)
    assert rules is not None
    words = rules[1].replace(">a-long-password", ">secret").split()
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "guard", "reset", *words)
        yield server.url.replace("redis://", "redis://guard:secret@")
        client.execute_command("ACL", "DELUSER", "guard")


def test_the_user_of_the_how_to_may_do_all_that_is_needed(careful: str) -> None:
    store = RedisStore(careful)

    through_a_day(store)

    store.close()


def test_the_user_of_the_how_to_may_not_touch_other_keys(careful: str) -> None:
    store = RedisStore(careful, prefix="somebody_else")

    with pytest.raises(StoreUnavailable, match=r"(?i)permission"):
        store.append("r/1/refused", b"{}")

    store.close()


def test_a_wrong_password_is_told_without_showing_it(careful: str) -> None:
    store = RedisStore(careful.replace("secret", "s3cr3t"))

    for use in (store.journal_length, lambda: asyncio.run(store.async_face().close_call("c"))):
        store.engine.breaker.worked()
        with pytest.raises(StoreUnavailable) as caught:
            use()
        assert "s3cr3t" not in str(caught.value)
        assert "Authentication" in str(caught.value)
    store.close()


# ---------------------------------------------------------------- TLS


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[tuple[servers.Server, Path]]:
    """A server that speaks TLS only, and the certificate to believe."""
    leg = next((each for each in ("redis7", "valkey") if _speaks_tls(each)), None)
    if leg is None:
        pytest.skip("TLS did not run: no server here was built with it")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
        f" -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout {key} -out {certificate}".split(),
        check=True,
        capture_output=True,
    )
    server = servers.Server(leg, ("--tls-cert-file", str(certificate), "--tls-key-file", str(key)))
    context = ssl.create_default_context(cafile=str(certificate))

    def ready() -> bool:
        import socket

        with (
            socket.create_connection(("127.0.0.1", tls_port)) as raw,
            context.wrap_socket(raw, server_hostname="localhost"),
        ):
            return True

    tls_port = servers.free_port()
    options = ("--tls-port", str(tls_port), "--tls-ca-cert-file", str(certificate), "--tls-auth-clients", "no")
    server.options += (*options, "--save", "")
    server.start(ready=ready)
    server.port = tls_port
    yield server, certificate
    server.stop()


def _speaks_tls(leg: str) -> bool:
    file = servers.binary(leg)
    if file is None:
        return False
    linked = subprocess.run(["ldd", str(file)], capture_output=True, text=True)
    return "libssl" in linked.stdout


def test_tls_is_spoken_and_the_certificate_looked_at(tls_server: tuple[servers.Server, Path]) -> None:
    server, certificate = tls_server
    good = RedisStore(f"rediss://localhost:{server.port}/0?ssl_ca_certs={certificate}&timeout=2")
    strangers = RedisStore(f"rediss://localhost:{server.port}/0?timeout=2")

    through_a_day(good)

    with pytest.raises(StoreUnavailable, match="certificate"):
        strangers.journal_length()
    strangers.engine.breaker.worked()
    with pytest.raises(StoreUnavailable, match="certificate"):
        asyncio.run(strangers.async_face().close_call("c"))
    trusting = RedisStore(f"rediss://localhost:{server.port}/0?ssl_cert_reqs=none&timeout=2")
    trusting.journal_length()
    asyncio.run(trusting.async_face().close_call("c"))
    for store in (good, strangers, trusting):
        store.close()


# ---------------------------------------------------------------- the URL


def test_a_url_is_read_with_all_its_parts() -> None:
    plain = read_url("redis://u%40x:p%3Aw@h.example:7000/3?timeout=0.5&max_connections=8")
    sentinel = read_url("redis+sentinel://:pw@a,b:1/mymaster/2?sentinel_password=spw")

    assert plain == Address((("h.example", 7000),), None, "u@x", "p:w", 3, timeout=0.5, connections=8)
    assert sentinel == Address(
        (("a", 26379), ("b", 1)), "mymaster", None, "pw", 2, sentinel_username=None, sentinel_password="spw"
    )
    assert read_url("rediss://[::1]:7/0").hosts == (("::1", 7),)
    assert "pw" not in sentinel.name


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis+cluster://h", "the scheme is none of redis, rediss"),
        ("redis://h/x", "the database in the URL is not a number"),
        ("redis://h:port", "the port in the URL is not a number"),
        ("redis://:SECR/ET@h", "in a password, write / @ : ? # as"),
        ("redis://:SECR?ET@h", "none of timeout, max_connections"),
        ("redis://h?timeout=0", "between 0 and 60"),
        ("redis+sentinel://h", "name the service"),
        ("redis://h?prefix=a{b}", "the prefix may have"),
        ("redis://h?ssl_ca_certs=x", "rediss://"),
        ("rediss://h?ssl_cert_reqs=maybe", "neither required nor none"),
    ],
)
def test_a_url_that_says_something_else_is_told_what_would_be_right(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        read_url(url)

    assert "SECR" not in str(caught.value)
    assert "ET" not in str(caught.value)


def test_the_store_of_a_redis_url_is_opened_at_its_first_use() -> None:
    store = open_store("redis://127.0.0.1:1/0")

    with pytest.raises(StoreUnavailable):
        store.journal_length()

    store.close()

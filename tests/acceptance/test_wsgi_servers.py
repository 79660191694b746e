"""The WSGI door behind the servers that people run: admit, refuse, stream, disconnect; and what a fork finds."""

from __future__ import annotations

import concurrent.futures
import os
import socket
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from llm_guard_mw.cli.demo.standin import StandIn
from tests.acceptance.conftest import SERVERS, Served, until
from tests.acceptance.test_acceptance import ASK, WHO, worth

WSGI_SERVERS = [name for name in SERVERS if name != "uvicorn"]
#: waitress is one process.
WORKERS = {"waitress": 1}

Serve = Callable[..., Served]


@pytest.fixture(params=WSGI_SERVERS)
def started(request: pytest.FixtureRequest, serve: Serve) -> Callable[..., Served]:
    def start(*limits: str) -> Served:
        listed = ", ".join(f'"{limit}"' for limit in limits)
        return serve(WORKERS.get(request.param, 2), server=request.param, limits=f"[{listed}]")

    return start


def post(served: Served, path: str = "/api/chat", **asked: Any) -> httpx2.Response:
    with httpx2.Client(base_url=served.url, headers=WHO, timeout=60) as client:
        return client.post(path, json={"q": ASK, **asked})


def settled(served: Served) -> list[dict[str, Any]]:
    """All rows, once nothing is held any more; the books add up."""
    verified = until(lambda: (found := served.verify()).open_holds == 0 and found, "nothing is held")
    assert verified.ok, verified.findings
    return served.events()


def test_calls_are_admitted_metered_and_refused(started: Callable[..., Served], provider: StandIn) -> None:
    served = started("$1/day per tenant", "2 requests/day per user")

    replies = [post(served) for _ in range(3)]

    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert replies[0].headers["x-llm-guard-decision"] == "allow"
    assert replies[0].json()["said"]
    assert replies[2].headers["x-llm-guard-decision"] == "reject"
    assert replies[2].headers["content-type"] == "application/problem+json"
    assert replies[2].json()["code"] == "rate_limited"
    rows = settled(served)
    assert [(row["user"], row["basis"]) for row in rows if row["kind"] == "settle"] == [("ada", "exact")] * 2
    assert served.spent("tenant=acme") == worth(provider)


@pytest.mark.parametrize("path", ["/api/chat", "/api/stream"])
def test_a_refused_sdk_call_is_our_429_also_in_a_lazy_stream(path: str, started: Callable[..., Served]) -> None:
    served = started("$0.00001/day per tenant")

    reply = post(served, path)

    assert reply.status_code == 429
    assert reply.json()["code"] == "never_fits"
    assert reply.headers["x-llm-guard-decision"] == "reject"
    assert [row["kind"] for row in settled(served)] == ["release", "refused"]


def test_a_stream_passes_piece_by_piece_and_is_metered(started: Callable[..., Served], provider: StandIn) -> None:
    served = started("$1/day per tenant")
    pieces = []

    with (
        httpx2.Client(base_url=served.url, headers=WHO, timeout=60) as client,
        client.stream("POST", "/api/stream", json={"q": ASK, "standin": "gap-ms=10"}) as reply,
    ):
        pieces = list(reply.iter_raw())

    assert len(pieces) > 10
    [row] = settled(served)
    assert (row["basis"], row["output_tokens"]) == ("exact", provider.rows[0].output_tokens)
    assert served.spent("tenant=acme") == worth(provider)


def test_a_client_that_goes_away_in_mid_stream_leaves_nothing_open(started: Callable[..., Served]) -> None:
    served = started("$1/day per tenant", "1 concurrent per user")

    hang_up_in_mid_stream(served, {"q": "Tell me all, in 300 words!", "standin": "gap-ms=10"})

    # The place is free again long before the lease of two minutes would end.
    until(lambda: post(served).status_code == 200, "the next call is admitted")
    rows = settled(served)
    assert {row["basis"] for row in rows if row["kind"] == "settle"} <= {"exact", "counted", "held"}
    assert len([row for row in rows if row["kind"] == "settle"]) == 2


def hang_up_in_mid_stream(served: Served, asked: dict[str, str]) -> None:
    address = urllib.parse.urlsplit(served.url)
    body = httpx2.Request("POST", served.url, json=asked).content
    head = [f"POST /api/stream HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"]
    head += [f"Content-Length: {len(body)}\r\n", *(f"{name}: {value}\r\n" for name, value in WHO.items()), "\r\n"]
    with socket.create_connection((str(address.hostname), address.port or 0), 20) as connection:
        connection.sendall("".join(head).encode() + body)
        received = b""
        while received.count(b"\r\n") < 20:  # the head, and some chunks
            received += connection.recv(4096)


def test_many_calls_at_once_are_all_answered(started: Callable[..., Served], provider: StandIn) -> None:
    served = started("$1/day per tenant", "1000 requests/minute per user")

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        replies = list(pool.map(lambda _: post(served, standin="first-byte-ms=20"), range(96)))

    assert {reply.status_code for reply in replies} == {200}
    assert len([row for row in settled(served) if row["kind"] == "settle"]) == 96
    assert served.spent("tenant=acme") == worth(provider)


@pytest.mark.parametrize(
    ("server", "more"),
    [
        ("gunicorn-sync", ()),
        ("gunicorn-gthread", ()),
        ("gunicorn-gevent", ("-c", "python:tests.acceptance.gunicorn_gevent")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_app_loaded_before_the_fork_starts_nothing_there_and_works_behind_it(
    server: str, more: tuple[str, ...], serve: Serve, provider: StandIn
) -> None:
    served = serve(2, "--preload", *more, server=server, limits='["$1/day per tenant"]')
    master = served.process.pid
    threads = len(os.listdir(f"/proc/{master}/task"))
    descriptors = [os.readlink(entry) for entry in Path(f"/proc/{master}/fd").iterdir()]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda n: post(served, "/api/stream" if n % 2 else "/api/chat"), range(32)))

    assert threads == 1
    assert not [path for path in descriptors if "guard.db" in path]
    assert {reply.status_code for reply in replies} == {200}
    assert len([row for row in settled(served) if row["kind"] == "settle"]) == 32
    assert served.spent("tenant=acme") == worth(provider)


def test_gevent_that_comes_after_the_guard_is_told_so_instead_of_standing_still(serve: Serve) -> None:
    served = serve(1, "--preload", server="gunicorn-gevent", limits='["$1/day per tenant"]')

    reply = post(served)

    assert reply.status_code == 500
    assert "patch first" in served.log.read_text()
    assert httpx2.get(f"{served.url}/ready").status_code == 200

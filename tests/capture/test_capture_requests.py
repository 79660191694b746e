"""Sessions of requests: held before they send, metered as they are read, whichever way that is."""

from __future__ import annotations

import gc
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
from requests.adapters import HTTPAdapter

from llm_guard_mw import process
from llm_guard_mw.capture import capture
from llm_guard_mw.cli.demo.standin import StandIn

ASK = {"model": "gpt-4o-mini", "max_tokens": 60, "messages": [{"role": "user", "content": "Why? In 30 words."}]}
LONG = {**ASK, "max_tokens": 500, "messages": [{"role": "user", "content": "Why? In 400 words."}]}
Served = Callable[[], list[tuple[int, int]]]


def with_key(session: requests.Session) -> requests.Session:
    session.headers.update({"authorization": "Bearer x", "x-api-key": "x"})
    return session


@pytest.fixture
def session() -> Iterator[requests.Session]:
    with capture(with_key(requests.Session())) as session:
        yield session


@pytest.fixture
def chat(url: str) -> str:
    return f"{url}/v1/chat/completions"


def streamed(answer: requests.Response) -> str:
    """The text of a stream, read as apps do that know nothing of a usage chunk at its end."""
    text = ""
    for line in answer.iter_lines():
        if line.startswith(b"data: ") and line != b"data: [DONE]":
            text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
    return text


def test_a_plain_answer_is_metered_as_it_was_served(
    session: requests.Session, chat: str, books: Any, served: Served
) -> None:
    answer = session.post(chat, json=ASK)

    assert len(answer.json()["choices"][0]["message"]["content"].split()) == 30
    assert books.tokens() == served()
    assert [event["basis"] for event in books.settled()] == ["exact"]
    assert books.add_up()


def test_a_stream_is_metered_without_showing_the_usage_that_only_we_asked_for(
    session: requests.Session, chat: str, books: Any, served: Served
) -> None:
    with session.post(chat, json={**ASK, "stream": True}, stream=True) as answer:
        text = streamed(answer)

    assert len(text.split()) == 30
    assert books.tokens() == served()
    assert [event["basis"] for event in books.settled()] == ["exact"]


def by_read(raw: Any) -> bytes:
    return bytes(raw.read())


def by_pieces(raw: Any) -> bytes:
    return b"".join(iter(lambda: raw.read(7), b""))


def by_read1(raw: Any) -> bytes:
    return b"".join(iter(lambda: raw.read1(64), b""))


def by_readinto(raw: Any) -> bytes:
    whole, buffer = b"", bytearray(50)
    while size := raw.readinto(buffer):
        whole += buffer[:size]
    return whole


def by_lines(raw: Any) -> bytes:
    return b"".join(raw)


def by_readline(raw: Any) -> bytes:
    return b"".join(iter(raw.readline, b""))


def by_text(raw: Any) -> bytes:
    return io.TextIOWrapper(raw, newline="").read().encode()


def by_chunks(raw: Any) -> bytes:
    return b"".join(raw.read_chunked())


def by_data(raw: Any) -> bytes:
    return bytes(raw.data)


READS = [by_read, by_pieces, by_read1, by_readinto, by_lines, by_readline, by_text, by_chunks, by_data]


@pytest.mark.parametrize("read", READS, ids=lambda read: read.__name__)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_however_the_raw_answer_is_read_it_is_metered(
    read: Any, stream: bool, session: requests.Session, chat: str, books: Any, served: Served
) -> None:
    if read is by_chunks and not stream:
        pytest.skip("an answer with a length has no chunks")
    answer = session.post(chat, json={**ASK, "stream": stream}, stream=True)

    body = read(answer.raw)

    assert (b"prompt_tokens" in body) != stream
    assert body.endswith(b"[DONE]\n\n") == stream
    assert books.tokens() == served()
    assert [event["basis"] for event in books.settled()] == ["exact"]


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("decoded", [True, False], ids=["decoded", "encoded"])
def test_a_compressed_answer_is_metered(
    decoded: bool, stream: bool, session: requests.Session, url: str, books: Any, served: Served
) -> None:
    ask = {"model": "claude-haiku-4-5", "max_tokens": 60, "messages": ASK["messages"], "stream": stream}
    headers = {"x-standin": "gzip=1", "accept-encoding": "gzip"}

    with session.post(f"{url}/v1/messages", json=ask, headers=headers, stream=True) as answer:
        body = answer.content if decoded else answer.raw.read()

    assert answer.headers["content-encoding"] == "gzip"
    assert (body[:2] == b"\x1f\x8b") != decoded
    assert books.tokens() == served()
    assert [event["basis"] for event in books.settled()] == ["exact"]


@pytest.mark.parametrize(
    "body",
    [
        lambda: json.dumps(ASK),
        lambda: io.BytesIO(json.dumps(ASK).encode()),
        lambda: io.StringIO(json.dumps(ASK)),
        lambda: iter([json.dumps(ASK)[:20], json.dumps(ASK)[20:].encode()]),
    ],
    ids=["text", "file", "text file", "generator"],
)
def test_a_body_of_any_kind_is_known_before_it_leaves(
    body: Any, session: requests.Session, chat: str, books: Any, served: Served
) -> None:
    answer = session.post(chat, data=body(), headers={"content-type": "application/json"})

    assert answer.status_code == 200
    assert books.tokens() == served()


def test_a_refusal_is_an_answer_in_the_providers_shape_and_nothing_leaves(
    session: requests.Session, chat: str, guarded: Any, provider: StandIn
) -> None:
    guarded(limits=["$0.0000001/day global"])

    answer = session.post(chat, json=ASK)

    assert answer.status_code == 429
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["code"] == "never_fits"
    with pytest.raises(requests.HTTPError, match="429"):
        answer.raise_for_status()
    with session.post(chat, json={**ASK, "stream": True}, stream=True) as refused:
        assert b"never_fits" in b"".join(refused.iter_lines())
    assert provider.arrived == 0


def test_requests_that_cost_nothing_pass(session: requests.Session, url: str, books: Any) -> None:
    assert session.get(f"{url}/v1/models").status_code == 200
    assert session.post(f"{url}/nowhere", json=ASK).status_code == 404

    assert books.events() == []


def test_a_stream_broken_off_early_is_counted_from_its_text(session: requests.Session, chat: str, books: Any) -> None:
    with session.post(chat, json={**LONG, "stream": True}, stream=True, headers={"x-standin": "gap-ms=2"}) as answer:
        lines = answer.iter_lines()
        for _ in range(20):
            next(lines)

    [event] = books.settled()
    assert event["basis"] == "counted"
    assert event["output_tokens"] < 400
    assert books.add_up()


def test_a_stream_that_is_dropped_is_settled(session: requests.Session, chat: str, books: Any) -> None:
    answer: Any = session.post(chat, json={**LONG, "stream": True}, stream=True, headers={"x-standin": "gap-ms=2"})
    next(answer.iter_lines())
    del answer
    gc.collect()

    assert books.quiet()
    assert [event["basis"] for event in books.settled()] == ["counted"]


def test_a_lost_connection_books_the_hold(session: requests.Session, chat: str, books: Any) -> None:
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        session.post(chat, json={**ASK, "stream": True}, headers={"x-standin": "cut=3"})

    assert [event["basis"] for event in books.settled()] == ["held"]
    assert books.add_up()


@pytest.mark.parametrize("retries", [0, 2])
def test_what_was_never_sent_costs_nothing(retries: int, session: requests.Session, books: Any) -> None:
    session.mount("http://127.0.0.1:1", HTTPAdapter(max_retries=retries))

    with pytest.raises(requests.ConnectionError):
        session.post("http://127.0.0.1:1/v1/chat/completions", json=ASK)

    assert books.settled() == []
    assert not process.install().desk.open
    assert books.add_up()


def test_an_error_of_the_provider_reaches_the_app_and_costs_nothing(
    session: requests.Session, chat: str, books: Any
) -> None:
    answer = session.post(chat, json=ASK, headers={"x-standin": "status=500"})

    assert answer.status_code == 500
    assert [event["cost_nanos"] for event in books.settled()] == [0]


def test_an_adapter_that_is_mounted_later_is_guarded(
    session: requests.Session, chat: str, url: str, books: Any, served: Served
) -> None:
    session.mount(url, HTTPAdapter(pool_maxsize=1))

    session.post(chat, json=ASK)

    assert books.tokens() == served()


def test_a_session_that_is_captured_twice_is_guarded_once(chat: str, books: Any, served: Served) -> None:
    with with_key(requests.Session()) as session:
        assert capture(capture(session)) is session
        session.post(chat, json=ASK)

    assert books.tokens() == served()


def test_a_session_of_a_class_of_its_own_is_guarded(chat: str, books: Any, served: Served) -> None:
    class Ours(requests.Session):
        pass

    with capture(with_key(Ours())) as session:
        session.post(chat, json=ASK)

    assert books.tokens() == served()


def test_a_prepared_request_stays_as_it_was(session: requests.Session, chat: str, books: Any) -> None:
    prepared = session.prepare_request(requests.Request("POST", chat, json={**ASK, "stream": True}))
    before = prepared.body

    session.send(prepared)

    assert prepared.body == before
    assert b"include_usage" not in bytes(prepared.body or b"")


def test_a_parallel_crowd_is_held_to_the_budget(chat: str, guarded: Any, provider: StandIn) -> None:
    from concurrent.futures import ThreadPoolExecutor

    books = guarded(limits=["$0.0005/day global"])

    def one(_: int) -> int:
        with capture(with_key(requests.Session())) as session:
            return session.post(chat, json=ASK).status_code

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(40)))

    assert set(answers) == {200, 429}
    assert sum(event["cost_nanos"] for event in books.settled()) <= 500_000
    assert books.add_up()

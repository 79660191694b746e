"""The Flask example, run as its README says: features answer, a spent budget is a 429, the page shows what is left."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import httpx2
import pytest

from llm_guard_mw.cli.demo.standin import StandIn, running

EXAMPLES = Path(__file__).parents[2] / "examples"
ASK = {"text": "Why is the sky blue? Say it in 100 words"}

Visit = Callable[..., httpx2.Client]


@pytest.fixture
def provider() -> StandIn:
    return StandIn()


@pytest.fixture
def visit(provider: StandIn, tmp_path: Path) -> Iterator[Visit]:
    """A browser of somebody: `visit("ada")` has logged in, `visit()` is a guest."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    browsers: list[httpx2.Client] = []

    def browser(name: str = "") -> httpx2.Client:
        browsers.append(httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, follow_redirects=True))
        if name:
            assert browsers[-1].post("/login", data={"name": name}).status_code == 200
        return browsers[-1]

    with running(provider) as url:
        keys = {"OPENAI_API_KEY": "", "ANTHROPIC_API_KEY": "", "GEMINI_API_KEY": "", "GOOGLE_API_KEY": ""}
        command = [sys.executable, "-m", "flask", "--app", str(EXAMPLES / "flask_app/main.py"), "run"]
        where = {"PYTHONPATH": os.pathsep.join([str(EXAMPLES / "flask_app"), str(EXAMPLES.parent)]), "STANDIN_URL": url}
        command += ["--port", str(port)]
        server = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **keys, **where})
        try:
            until_it_listens(port, server)
            yield browser
        finally:
            for each in browsers:
                each.close()
            server.terminate()
            server.wait(20)


def until_it_listens(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the example did not start")


def left(browser: httpx2.Client) -> dict[str, str]:
    """What the page says is left, by limit."""
    page = browser.get("/").text
    rows = re.findall(r"<tr>\s*<td>(.+)\n\s*<td>(.+)\n.*\n\s*<td>(.+)\n\s*<td>(.*)", page)
    return {f"{limit} on {place}": left for limit, place, left, _ in rows}


def test_the_example_answers_and_its_page_shows_what_that_left(visit: Visit, provider: StandIn) -> None:
    ada = visit("ada")
    before, resets = left(ada), re.findall(r'<time datetime="([^"]+)"', ada.get("/").text)
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)

    chat = ada.post("/ai/chat", json=ASK)
    story = ada.post("/ai/stream", json=ASK)
    summary = ada.post("/ai/summarize", json=ASK)

    assert chat.json()["model"] == "gpt-4o"
    assert story.text.startswith("You asked: Tell a story")
    assert summary.json()["text"].startswith("You asked: Summarize:")
    assert before == {
        "$0.05/day per user on /ai/chat": "$0.0500",
        "$0.10/day per tenant on everything": "$0.1000",
        "$1/day per user on everything": "$1.0000",
        "20 requests/minute per user on /ai/stream": "20",
        "$0.005/month per tenant on /ai/summarize": "$0.0050",
    }
    assert tomorrow in map(datetime.fromisoformat, resets)
    row = next(row for row in provider.rows if row.model.startswith("gpt-4o"))
    cost = Decimal(row.input_tokens * 2500 + row.output_tokens * 10_000).scaleb(-9)
    now = left(ada)
    assert now["$0.05/day per user on /ai/chat"] == f"${Decimal('0.05') - cost:.4f}"
    assert now["20 requests/minute per user on /ai/stream"] in ("19", "20")  # it fills up again
    assert now["$1/day per user on everything"] < "$1.0000"
    assert left(visit("bob"))["$0.10/day per tenant on everything"] == now["$0.10/day per tenant on everything"]


def test_whoever_has_spent_his_budget_is_refused_and_nobody_else(visit: Visit, provider: StandIn) -> None:
    bob, ada, guest = visit("bob"), visit("ada"), visit()

    answers = [bob.post("/ai/chat", json=ASK) for _ in range(40)]

    assert answers[0].status_code == 200
    assert answers[-1].status_code == 429
    assert answers[-1].json()["limit"] == "$0.02/day per user"
    assert len(provider.rows) == sum(answer.status_code == 200 for answer in answers)
    assert left(bob)["$0.02/day per user on everything"] < "$0.0100"
    assert ada.post("/ai/chat", json=ASK).status_code == 200
    assert left(guest)["$0.10/day per tenant on everything"] == "$0.1000"


def test_each_guest_has_a_name_of_his_own_and_all_share_a_budget(visit: Visit) -> None:
    first, second = visit(), visit()

    assert first.post("/ai/chat", json=ASK).status_code == 200

    assert left(first)["$0.05/day per user on /ai/chat"] < "$0.0500"
    assert left(second)["$0.05/day per user on /ai/chat"] == "$0.0500"
    assert left(second)["$0.10/day per tenant on everything"] < "$0.1000"


def test_both_examples_find_their_provider_alike() -> None:
    fastapi, flask = [EXAMPLES / f"{name}_app" / "provider.py" for name in ("fastapi", "flask")]

    assert fastapi.read_bytes() == flask.read_bytes()

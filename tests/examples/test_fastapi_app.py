"""The FastAPI example, run as its README says: features answer, and a spent budget is a 429."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from llm_guard_mw.cli.demo.standin import StandIn, running

EXAMPLE = Path(__file__).parents[2] / "examples" / "fastapi_app"


def who(user: str, plan: str) -> dict[str, str]:
    return {"x-user-id": user, "x-tenant-id": "acme", "x-plan": plan}


@pytest.fixture
def provider() -> StandIn:
    return StandIn()


@pytest.fixture
def app(provider: StandIn, tmp_path: Path) -> Iterator[httpx2.Client]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with running(provider) as url:
        keys = {"OPENAI_API_KEY": "", "ANTHROPIC_API_KEY": "", "GEMINI_API_KEY": "", "GOOGLE_API_KEY": ""}
        command = [sys.executable, "-m", "uvicorn", "main:app", "--app-dir", str(EXAMPLE), "--port", str(port)]
        command += ["--log-level", "warning"]
        server = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **keys, "STANDIN_URL": url})
        try:
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
                until_it_listens(client, server)
                yield client
        finally:
            server.terminate()
            server.wait(20)


def until_it_listens(client: httpx2.Client, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            client.get("/health")
        except httpx2.ConnectError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the example did not start")


def test_the_example_answers_and_keeps_its_budgets(app: httpx2.Client, provider: StandIn) -> None:
    ask = {"text": "Why is the sky blue?"}

    story = app.post("/stream", json=ask, headers=who("ada", "pro"))
    summary = app.post("/summarize", json=ask, headers=who("ada", "pro"))
    stranger = app.post("/chat", json=ask)
    answers = [app.post("/chat", json=ask, headers=who("bob", "free")) for _ in range(60)]

    assert story.text.startswith("You asked: Tell a story")
    assert summary.json()["text"].startswith("You asked: Summarize:")
    assert stranger.status_code == 401
    good = [answer for answer in answers if answer.status_code == 200]
    assert good[0].json()["model"] == "gpt-4o"
    assert answers[-1].status_code == 429
    assert answers[-1].json()["code"] in ("budget_spent", "never_fits")
    assert len(provider.rows) == len(good) + 2

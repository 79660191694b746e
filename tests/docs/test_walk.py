"""The newcomer's walk: a page is followed from the top, in a fresh folder, and what it shows is what happens.

Files are written as the page has them, the app runs under uvicorn, `curl` lines are sent, commands are run. What
the page prints of an answer has to be in a real one; figures there may differ. Tables have to be the same.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from llm_guard_mw.cli.demo.standin import StandIn
from tests.docs.pages import ROOT, Snippet, snippets

#: So often a newcomer repeats a line before he doubts the page.
TRIES = 12


@dataclass(frozen=True)
class Reply:
    status: int
    reason: str
    headers: dict[str, str]
    body: str


@dataclass
class Walk:
    """Where somebody is who follows a page."""

    folder: Path
    seen: list[str] = field(default_factory=list)  # what the page showed, and really happened
    server: subprocess.Popen[bytes] | None = None
    serve: list[str] = field(default_factory=list)
    stale: bool = False  # a file was edited after the server had started
    port: int = 0
    curl: list[str] = field(default_factory=list)
    reply: Reply | None = None
    printed: str = ""

    def follow(self, page: Path) -> None:
        for snippet in snippets(page):
            if snippet.language in ("python", "toml") and snippet.file:
                (self.folder / snippet.file).write_text(snippet.code)
                self.stale = True
            elif snippet.language == "sh":
                self.printed = ""
                for command in snippet.commands:
                    self.type(shlex.split(command, comments=True))
            elif snippet.language == "http":
                self.compare_answer(snippet)
            elif snippet.language == "text":
                self.compare_output(snippet)

    def type(self, words: list[str]) -> None:
        if words[0] == "uvicorn":
            self.serve = words[1:]
            self.restart()
        elif words[0] == "curl":
            self.curl = words[1:]
            self.ask()
        elif words[0] == "llm-guard-mw":
            self.run(words[1:])

    def run(self, words: list[str]) -> None:
        command = [sys.executable, "-c", "from llm_guard_mw.cli import app; app()", *words]
        ended = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
        self.printed += ended.stdout

    # ------------------------------------------------------------ the app

    def restart(self) -> None:
        self.stop()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        command = [sys.executable, "-m", "uvicorn", *self.serve, "--port", str(self.port), "--log-level", "warning"]
        with (self.folder / "server.log").open("ab") as log:
            self.server = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)
        self.stale = False
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                given_up = self.server.poll() is not None or time.monotonic() > end
                assert not given_up, (self.folder / "server.log").read_text()
                time.sleep(0.05)

    def stop(self) -> None:
        if self.server is not None:
            self.server.terminate()
            self.server.wait(20)
            self.server = None

    def ask(self) -> Reply:
        if self.stale:
            self.restart()
        words, headers, body, url = iter(self.curl), {}, None, ""
        for word in words:
            if word in ("-H", "-X", "-d"):
                value = next(words)
                if word == "-H":
                    name, _, text = value.partition(": ")
                    headers[name] = text
                elif word == "-d":
                    body = value
            elif word != "-i":
                url = word
        parts = urlsplit(url if "//" in url else f"//{url}")
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("POST", f"{parts.path}?{parts.query}", body, headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        self.reply = Reply(response.status, response.reason, dict(response.getheaders()), text)
        return self.reply

    # ------------------------------------------------------------ what the page shows

    def compare_answer(self, snippet: Snippet) -> None:
        head, _, body = snippet.code.partition("\n\n")
        lines = head.splitlines()
        first = lines.pop(0) if lines[0].startswith("HTTP/") else "HTTP/1.1 200 OK"
        for _ in range(TRIES):
            reply = self.ask()
            if first == f"HTTP/1.1 {reply.status} {reply.reason}":
                break
        else:
            raise AssertionError(f"{snippet}: never {first!r}, but {reply}")
        for line in lines:
            name, _, value = line.partition(": ")
            assert without_figures(reply.headers[name]) == without_figures(value), str(snippet)
        if body:
            shown, real = json.loads(body), json.loads(reply.body)
            assert {name: without_figures(real[name]) for name in shown} == {
                name: without_figures(value) for name, value in shown.items()
            }, str(snippet)
        self.seen.append(first)

    def compare_output(self, snippet: Snippet) -> None:
        if not self.printed:  # the command stands in the prose
            (command,) = re.findall(r"`(llm-guard-mw [^`]+)`", snippet.before)
            self.type(shlex.split(command))
        assert words_of(self.printed) == words_of(snippet.code), str(snippet)
        self.printed = ""
        self.seen.append(snippet.code.splitlines()[0])


def without_figures(text: str) -> str:
    """Ids, times and amounts differ; all else does not."""
    return re.sub(r"\b[0-9a-f]{32}\b|\d[\d,.:TZ-]*", "#", text)


def words_of(table: str) -> list[list[str]]:
    return [line.split() for line in table.strip().splitlines()]


@contextmanager
def walking(folder: Path) -> Iterator[Walk]:
    walk = Walk(folder)
    try:
        yield walk
    finally:
        walk.stop()


@pytest.fixture
def walk(folder: Path, provider: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[Walk]:
    for name in [name for name in os.environ if name.startswith("LLM_GUARD_")]:
        monkeypatch.delenv(name)
    with walking(folder) as walk:
        yield walk


def test_the_readme_leads_from_nothing_to_a_refusal_and_a_report(walk: Walk) -> None:
    walk.follow(ROOT / "README.md")

    assert walk.seen[0] == "HTTP/1.1 429 Too Many Requests"
    assert walk.seen[1].startswith("user ")


def test_the_tutorial_leads_from_an_unguarded_app_to_a_budget_for_each_user(walk: Walk) -> None:
    walk.follow(ROOT / "docs/tutorial/first-guard.md")

    assert [line.split()[0] for line in walk.seen] == ["guards", "HTTP/1.1", "HTTP/1.1", "user"]
    assert walk.reply is not None
    assert (walk.reply.status, walk.reply.headers["x-llm-guard-decision"]) == (200, "allow")
    walk.curl = [word for word in walk.curl if word != "x-user-id: ada"]
    walk.curl.remove("-H")
    assert walk.ask().status == 401


def test_the_example_runs_as_its_readme_says(walk: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    example = ROOT / "examples/fastapi_app"
    for name in ("main.py", "provider.py", "llm_guard.toml"):
        shutil.copy(example / name, walk.folder)
    # The example looks for the stand-in itself, where no key is set.
    monkeypatch.setenv("STANDIN_URL", os.environ["ANTHROPIC_BASE_URL"])
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.delenv(name)

    walk.follow(example / "README.md")

    assert walk.seen[0] == "HTTP/1.1 429 Too Many Requests"
    walk.curl = ["x-plan: pro" if word == "x-plan: free" else word for word in walk.curl]
    assert walk.ask().status == 200

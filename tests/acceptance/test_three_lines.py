"""From a framework's own quick-start to a guarded route: the lines it takes are put in, and the whole is timed.

pytest tests/acceptance/test_three_lines.py -rP        # prints the seconds
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from llm_guard_mw.cli.demo.standin import StandIn, running
from tests.docs.pages import ROOT, snippets

#: So often somebody asks who wants to see a refusal.
TRIES = 20


@dataclass(frozen=True)
class Line:
    """One line of the app that is new, or takes the place of another."""

    file: str
    after: str  # the line that it comes behind, or replaces
    text: str
    replaces: bool = False


@dataclass(frozen=True)
class QuickStart:
    """How a framework's documentation begins a project, and what guards it then."""

    name: str
    make: Callable[[Path], None]
    serve: tuple[str, ...]
    lines: tuple[Line, ...]


ASKING = """
from openai import OpenAI

client = OpenAI()


def answer():
    messages = [{"role": "user", "content": "Explain the tides in 300 words"}]
    return client.chat.completions.create(model="gpt-4o", max_tokens=300, messages=messages)
"""


def make_flask(folder: Path) -> None:
    (folder / "hello.py").write_text(
        "from flask import Flask\n"
        + ASKING
        + """

app = Flask(__name__)


@app.route("/")
def hello_world():
    return "<p>Hello, World!</p>"


@app.post("/chat")
def chat():
    return {"text": answer().choices[0].message.content}
"""
    )


def make_fastapi(folder: Path) -> None:
    (folder / "main.py").write_text(
        "from fastapi import FastAPI\n"
        + ASKING
        + """

app = FastAPI()


@app.get("/")
async def root():
    return {"message": "Hello World"}


@app.post("/chat")
def chat():
    return {"text": answer().choices[0].message.content}
"""
    )


def make_django(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "django", "startproject", "mysite", "."], cwd=folder, check=True, timeout=60)
    (folder / "mysite/views.py").write_text(
        "from django.http import JsonResponse\nfrom django.views.decorators.csrf import csrf_exempt\n"
        + ASKING
        + """

@csrf_exempt
def chat(request):
    return JsonResponse({"text": answer().choices[0].message.content})
"""
    )
    urls = folder / "mysite/urls.py"
    urls.write_text(
        urls.read_text()
        .replace("from django.urls import path", "from django.urls import path\n\nfrom mysite import views")
        .replace("urlpatterns = [", 'urlpatterns = [\n    path("chat", views.chat),')
    )


QUICK_STARTS = (
    QuickStart(
        "flask",
        make_flask,
        ("-m", "flask", "--app", "hello", "run", "--port", "{port}"),
        (
            Line("hello.py", "from flask import Flask", "from llm_guard_mw import WSGIGuardMiddleware, capture"),
            Line(
                "hello.py",
                "app = Flask(__name__)",
                'app.wsgi_app = WSGIGuardMiddleware(app.wsgi_app, config="llm_guard.toml")',
            ),
            Line("hello.py", "client = OpenAI()", "client = capture(OpenAI())", replaces=True),
        ),
    ),
    QuickStart(
        "fastapi",
        make_fastapi,
        ("-m", "uvicorn", "main:app", "--log-level", "warning", "--port", "{port}"),
        (
            Line("main.py", "from fastapi import FastAPI", "from llm_guard_mw import GuardMiddleware, capture"),
            Line("main.py", "app = FastAPI()", 'app.add_middleware(GuardMiddleware, config="llm_guard.toml")'),
            Line("main.py", "client = OpenAI()", "client = capture(OpenAI())", replaces=True),
        ),
    ),
    QuickStart(
        "django",
        make_django,
        ("manage.py", "runserver", "--noreload", "{port}"),
        (
            Line("mysite/settings.py", "INSTALLED_APPS = [", '    "llm_guard_mw.django",'),
            Line("mysite/settings.py", "MIDDLEWARE = [", '    "llm_guard_mw.django.GuardMiddleware",'),
            Line(
                "mysite/settings.py",
                "BASE_DIR = Path(__file__).resolve().parent.parent",
                'LLM_GUARD = BASE_DIR / "llm_guard.toml"',
            ),
            # ... and in the views, as everywhere
            Line("mysite/views.py", "from openai import OpenAI", "from llm_guard_mw import capture"),
            Line("mysite/views.py", "client = OpenAI()", "client = capture(OpenAI())", replaces=True),
        ),
    ),
)


def put_in(folder: Path, line: Line) -> None:
    file = folder / line.file
    lines = file.read_text().splitlines()
    assert lines.count(line.after) == 1, line
    where = lines.index(line.after)
    lines[where : where + 1] = [line.text] if line.replaces else [line.after, line.text]
    file.write_text("\n".join(lines) + "\n")


@contextmanager
def served(folder: Path, start: QuickStart) -> Iterator[httpx2.Client]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, *(word.format(port=port) for word in start.serve)]
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "server.log").read_text()
                assert time.monotonic() < end, (folder / "server.log").read_text()
                time.sleep(0.02)
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield client
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    for name in [name for name in os.environ if name.startswith("LLM_GUARD_")]:
        monkeypatch.delenv(name)
    standin = StandIn()
    with running(standin) as url:
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        monkeypatch.setenv("OPENAI_BASE_URL", f"{url}/v1")
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        yield standin


@pytest.mark.parametrize("start", QUICK_STARTS, ids=lambda start: start.name)
def test_three_lines_guard_a_quick_starts_project(
    start: QuickStart, tmp_path: Path, provider: StandIn, record_property: Callable[[str, object], None]
) -> None:
    clock = time.perf_counter
    began = clock()
    start.make(tmp_path)
    with served(tmp_path, start) as client:
        bare = [client.post("/chat").status_code for _ in range(TRIES)]
    without = clock()

    # The README's own configuration: two cents a day for each address.
    (config,) = [each for each in snippets(ROOT / "README.md") if each.file == "llm_guard.toml"]
    (tmp_path / "llm_guard.toml").write_text(config.code)
    for line in start.lines:
        put_in(tmp_path, line)
    arrived = provider.arrived
    with served(tmp_path, start) as client:
        listening = clock()
        first = client.post("/chat")
        answered = clock()
        guarded = [client.post("/chat") for _ in range(TRIES)]
        refused = clock()

    seconds = {
        "bare project, made and asked": without - began,
        "edited and started": listening - without,
        "first guarded answer": answered - listening,
        f"{TRIES} more": refused - answered,
    }
    print(f"{start.name}: {len(start.lines)} lines;", ", ".join(f"{what} {s:.2f} s" for what, s in seconds.items()))
    for what, length in seconds.items():
        record_property(what, round(length, 3))
    assert bare == [200] * TRIES
    assert (first.status_code, first.headers["x-llm-guard-decision"]) == (200, "allow")
    assert guarded[-1].status_code == 429
    assert guarded[-1].json()["limit"] == "$0.02/day per user"
    assert guarded[-1].headers["retry-after"]
    good = 1 + sum(each.status_code == 200 for each in guarded)
    assert provider.arrived - arrived == good


def test_djangos_own_check_knows_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (start,) = [each for each in QUICK_STARTS if each.name == "django"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    start.make(tmp_path)
    for line in start.lines:
        put_in(tmp_path, line)
    (tmp_path / "llm_guard.toml").write_text('[[routes]]\npath = "/chta"\nlimits = ["$5/fortnight per user"]\n')

    wrong = check(tmp_path)
    (tmp_path / "llm_guard.toml").write_text('[[routes]]\npath = "/chta"\nlimits = ["$5/day per user"]\n')
    better = check(tmp_path)

    assert wrong.returncode == 1
    assert "(llm_guard_mw.E001)" in wrong.stderr
    assert "llm_guard.toml:3" in wrong.stderr
    assert better.returncode == 0
    assert "(llm_guard_mw.W003) no view answers" in better.stderr


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "manage.py", "check"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)

"""Every snippet of the documentation is run, or at least read by whoever would have to read it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from llm_guard_mw import load_config, process
from llm_guard_mw.cli import app as cli
from tests.docs.pages import ROOT, Snippet, all_snippets, pages, snippets

SECRETS = {"JWT_KEY": "a secret of thirty-two bytes or so", "OPENAI_API_KEY": "none"}

#: A page that names no configuration of its own gets this one.
USUAL = """
limits = ["$5/day per user"]

[identity]
anonymous = "shared"
"""

#: google-genai subclasses aiohttp's session, which aiohttp warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Inheritance class:DeprecationWarning")


def by_place(snippet: Snippet) -> str:
    return str(snippet)


def by_page(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_there_are_snippets_to_run() -> None:
    languages = {snippet.language for page in pages() for snippet in snippets(page)}

    assert {"python", "toml", "sh", "json"} <= languages <= {"python", "toml", "sh", "json", "http", "text", ""}


# ---------------------------------------------------------------- toml, json


@pytest.mark.parametrize("snippet", all_snippets("toml"), ids=by_place)
def test_a_configuration_is_accepted(snippet: Snippet, folder: Path) -> None:
    (folder / "llm_guard.toml").write_text(snippet.code)
    for other in snippets(snippet.page):
        if other.language == "python" and other.file:
            write(folder, other)

    load_config(environ=SECRETS)


@pytest.mark.parametrize("snippet", all_snippets("json"), ids=by_place)
def test_json_is_json(snippet: Snippet) -> None:
    json.loads(snippet.code)


# ---------------------------------------------------------------- python


@pytest.mark.parametrize(
    "page", [page for page in pages() if any(snippet.language == "python" for snippet in snippets(page))], ids=by_page
)
@pytest.mark.usefixtures("provider", "as_it_was")
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path, folder: Path) -> None:
    """Names carry over on a page. What begins with a file's name is that file; tests are run by pytest."""
    (folder / "llm_guard.toml").write_text(USUAL)
    for snippet in snippets(page):
        if snippet.language == "toml" and snippet.file:
            write(folder, snippet)
            break
    names: dict[str, Any] = {"__name__": "snippet"}
    for snippet in snippets(page):
        if snippet.language != "python":
            continue
        if snippet.file:
            compile(write(folder, snippet).read_text(), str(snippet), "exec")
        else:
            source = "\n" * snippet.line + snippet.code  # so that a traceback has the page's lines
            exec(compile(source, str(page), "exec", dont_inherit=True), names)
    if list(folder.glob("test_*.py")):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stdout


def write(folder: Path, snippet: Snippet) -> Path:
    path = folder / str(snippet.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(snippet.code)
    return path


@pytest.mark.usefixtures("provider", "as_it_was")
def test_the_capture_page_leaves_the_books_that_it_describes(folder: Path) -> None:
    page = ROOT / "docs/how-to/capture.md"

    run_page(page, folder)

    ledger = books()
    spent = {(row["user"], row["feature"]) for row in ledger.report(["user", "feature"])}
    assert spent == {(None, None), ("ada", "digest"), ("ada", "tickets")}
    assert [row["tag:queue"] for row in ledger.report(["tag:queue"]) if row["tag:queue"]] == ["billing"]
    assert sum(event["credits"] or 0 for event in ledger.events()) == 3


def run_page(page: Path, folder: Path) -> dict[str, Any]:
    (folder / "llm_guard.toml").write_text(USUAL)
    names: dict[str, Any] = {"__name__": "snippet"}
    for snippet in snippets(page):
        if snippet.language == "python":
            exec(compile(snippet.code, str(snippet), "exec", dont_inherit=True), names)
    return names


def books() -> Any:
    installed = process.install()
    process.AsyncGuard()  # the keeper is running
    installed.keeper.ledger.drain_all(installed.desk.store)
    return installed.keeper.ledger


@pytest.mark.usefixtures("provider", "as_it_was")
def test_a_calls_line_has_the_fields_that_the_page_shows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs/how-to/logs.md"
    standard, with_structlog = [snippet.code for snippet in snippets(page) if snippet.language == "python"]
    (shown,) = [json.loads(snippet.code) for snippet in snippets(page) if snippet.language == "json"]
    (folder / "llm_guard.toml").write_text(USUAL)

    lines = []
    for setup in (standard, with_structlog):
        exec(compile(setup, str(page), "exec", dont_inherit=True), {})
        run_call()
        lines += [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    calls = [line for line in lines if line["event"] == "call"]
    assert [set(call) for call in calls] == [set(shown)] * 2
    assert {type(value) for call in calls for value in call["left"].values()} == {int}


def run_call() -> None:
    import openai

    from llm_guard_mw import Guard, capture

    client = capture(openai.OpenAI())
    with Guard().as_user(user="ada", feature="chat"):
        client.chat.completions.create(model="gpt-4o", max_tokens=9, messages=[{"role": "user", "content": "Why?"}])


@pytest.mark.usefixtures("provider", "as_it_was")
def test_observing_as_the_page_configures_it_refuses_nobody_and_says_who_would_be(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    page = ROOT / "docs/how-to/observe-first.md"
    write(folder, next(snippet for snippet in snippets(page) if snippet.file == "llm_guard.toml"))
    exec(snippets(ROOT / "README.md")[0].code, names := {})
    caplog.set_level("INFO", "llm_guard")

    with TestClient(names["app"]) as client:
        answers = [client.post("/chat?text=Explain+the+tides+in+300+words") for _ in range(3)]
        client.portal.call(names["client"].close)

    assert [answer.status_code for answer in answers] == [200, 200, 200]
    calls = [json.loads(record.message) for record in caplog.records if '"event":"call"' in record.message]
    assert {(call["would_refuse"], call["limit"]) for call in calls} == {("never_fits", "$0.002/day per user")}
    assert len(list(books().events())) == 3


# ---------------------------------------------------------------- sh


@pytest.mark.parametrize("snippet", all_snippets("sh"), ids=by_place)
def test_a_command_line_can_be_typed(snippet: Snippet) -> None:
    """Commands that other tests run from a page's beginning are only read here: do they and their options exist?"""
    for command in snippet.commands:
        words = [word for word in shlex.split(command, comments=True) if word != "&"]
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            KNOWN[words[0]](words)


def read_ours(words: list[str]) -> None:
    answer = CliRunner().invoke(cli, [words[1], "--help"])
    assert answer.exit_code == 0, words
    for word in words:
        if word.startswith("--"):
            assert word in answer.output, words


def read_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"llm_guard_mw\[([\w,]+)\]", " ".join(words))
    assert words[1] == "install"
    assert all(extra in extras for names in named for extra in names.split(",")), words


def read_make(words: list[str]) -> None:
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words


def read_python(words: list[str]) -> None:
    assert words[1] == "-m"
    assert find_spec(words[2]) is not None, words


def read_uvicorn(words: list[str]) -> None:
    assert words[1] == "main:app", words


def read_flask(words: list[str]) -> None:
    assert words[1:4] == ["--app", "main", "run"], words


def read_curl(words: list[str]) -> None:
    assert any("localhost:8000/" in word for word in words), words


KNOWN = {
    "llm-guard-mw": read_ours,
    "pip": read_pip,
    "make": read_make,
    "python": read_python,
    "uvicorn": read_uvicorn,
    "flask": read_flask,
    "curl": read_curl,
    "export": lambda words: None,
}


# ---------------------------------------------------------------- links


@pytest.mark.parametrize("page", pages(), ids=by_page)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), target
        if anchor:
            assert anchor in anchors(other), target


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_can_be_reached_from_the_index() -> None:
    reached, waiting = set(), [ROOT / "docs/index.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
        waiting += [(page.parent / link).resolve() for link in links if not link.startswith("http")]

    assert [page for page in pages() if page not in reached and "docs" in page.parts] == []


def test_the_readme_fits_one_screen() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 80

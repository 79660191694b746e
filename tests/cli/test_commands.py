"""The command line as people and programs use it."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_guard_mw import process
from llm_guard_mw.model import UsageEvent
from tests.ledger.bench import DAY_BUDGET, Bench

Run = Callable[..., Any]

# ---------------------------------------------------------------- init, check


def test_what_init_writes_is_accepted_by_check(folder: Path, run: Run) -> None:
    assert run("init").code == 0
    assert run("check").code == 0
    assert run("check", "llm_guard.toml").code == 0


def test_init_does_not_write_over_a_file(configured: Path, run: Run) -> None:
    before = (configured / "llm_guard.toml").read_text()

    answer = run("init")

    assert answer.code == 2
    assert "is there already" in answer.err
    assert (configured / "llm_guard.toml").read_text() == before
    assert run("init", "--force").code == 0
    assert (configured / "llm_guard.toml").read_text() != before


def test_init_says_where_it_wrote(folder: Path, run: Run) -> None:
    assert json.loads(run("init", "--config", "other.toml", "--format", "json").out) == {"written": "other.toml"}
    assert run("init", "--config", "no/such/folder.toml").code == 2


def test_check_shows_what_will_be_guarded(configured: Path, run: Run) -> None:
    answer = run("check")

    assert answer.code == 0
    lines = [line.split() for line in answer.out.splitlines()]
    assert ["route", "chat", "POST", "/api/chat", "$2/day", "per", "user", "everybody"] in lines
    assert [
        *["route", "chat", "POST", "/api/chat", "5", "requests/minute", "per", "user", "tier", "=", "free"]
    ] in lines
    assert ["all", "all", "guarded", "calls", "$5/day", "global", "everybody"] in lines


VIEWS = """
from flask import Flask
from llm_guard_mw import WSGIGuardMiddleware, guarded

def make():
    app = Flask("views")

    @app.post("/api/chat")
    @guarded("1 requests/minute per user", "$9/day per user", feature="talk")
    def chat(): ...

    @app.get("/digest/<int:id>")
    @guarded({"limit": "3 requests/minute per user", "when": {"tier": "free"}}, feature="digest", model="gpt-4o")
    def digest(id): ...

    app.wsgi_app = WSGIGuardMiddleware(app.wsgi_app, config="llm_guard.toml")
    return app

lost = guarded()(lambda: None)
app = make()
"""


@pytest.fixture
def views(configured: Path) -> Iterator[Callable[[str], str]]:
    """A module with views: `views("make()")` is how `--app` names it. Each test's is a module of its own."""
    name = f"views_{configured.name.replace('-', '_')}"

    def write(app: str, text: str = VIEWS) -> str:
        (configured / f"{name}.py").write_text(text)
        return f"{name}:{app}"

    yield write
    sys.modules.pop(name, None)
    process.uninstall()


@pytest.mark.parametrize("app", ["app", "make()", "app.wsgi_app"])
def test_check_sees_what_the_views_say(app: str, views: Any, run: Run) -> None:
    answer = run("check", "--app", views(app))

    assert answer.code == 0, answer.err
    lines = [" ".join(line.split()) for line in answer.out.splitlines()]
    module = views(app).partition(":")[0]
    assert f"view {module}:make.<locals>.chat POST /api/chat 1 requests/minute per user everybody" in lines
    assert (
        f"view {module}:make.<locals>.digest GET/HEAD /digest/{{id:int}} 3 requests/minute per user tier = free"
    ) in lines
    assert any('feature "talk" gives way to "chat"' in line for line in lines)
    assert any('"$9/day per user" gives way to "$2/day per user"' in line for line in lines)
    assert any(f"no route leads to {module}:<lambda>" in line for line in lines)


def test_check_tells_programs_of_views_as_well(views: Any, run: Run) -> None:
    answer = json.loads(run("check", "--app", views("app"), "--format", "json").out)

    chat, digest = sorted(answer["views"], key=lambda view: view["path"])
    assert (chat["route"], chat["feature"], chat["model"]) == ("chat", "chat", "gpt-4o")
    assert (digest["route"], digest["feature"], digest["model"]) == ("/digest/{id:int}", "digest", "gpt-4o")
    assert "views" not in json.loads(run("check", "--format", "json").out)


def test_check_tells_mistakes_at_views_beside_those_of_the_file(configured: Path, views: Any, run: Run) -> None:
    (configured / "llm_guard.toml").write_text('mod = "observe"')

    answer = run("check", "--app", views("app", VIEWS.replace("$9/day", "$9/dya")))

    assert answer.code == 1
    assert 'unknown key "mod"' in answer.out
    assert 'did you mean "day"?' in answer.out


@pytest.mark.parametrize(
    ("app", "reason"),
    [("", "names no app"), ("nothing", "no attribute 'nothing'"), ("lost", "is no app"), ("VIEWS", "cannot be loaded")],
)
def test_check_says_what_is_wrong_with_an_app(app: str, reason: str, views: Any, run: Run) -> None:
    answer = run("check", "--app", views(app))

    assert answer.code == 2
    assert reason in answer.err


def test_check_names_every_mistake_with_file_line_value_and_fix(folder: Path, run: Run) -> None:
    (folder / "bad.toml").write_text('limits = ["$5/fortnight global"]\n\n[budgets]\nhrd = 1.1\n')

    answer = run("check", "bad.toml")

    assert answer.code == 1
    assert "bad.toml:1" in answer.out
    assert "fortnight" in answer.out
    assert "bad.toml:4" in answer.out
    assert "fix: " in answer.out


def test_check_tells_programs_the_same(folder: Path, run: Run) -> None:
    (folder / "bad.toml").write_text('limits = ["$5/fortnight global"]\n\n[budgets]\nhrd = 1.1\n')

    whole = run("check", "bad.toml", "--format", "json")
    lines = run("check", "bad.toml", "--format", "jsonl")
    table = run("check", "bad.toml", "--format", "csv")

    assert (whole.code, lines.code, table.code) == (1, 1, 1)
    found = json.loads(whole.out)
    assert (found["ok"], len(found["mistakes"]), found["warnings"]) == (False, 2, [])
    assert {"where", "problem", "fix"} == set(found["mistakes"][0])
    assert [json.loads(line)["severity"] for line in lines.out.splitlines()] == ["mistake", "mistake"]
    assert [row["severity"] for row in csv.DictReader(io.StringIO(table.out))] == ["mistake", "mistake"]


def test_check_warns_of_a_model_without_a_price(configured: Path, run: Run) -> None:
    text = (configured / "llm_guard.toml").read_text()
    (configured / "llm_guard.toml").write_text(text.replace("gpt-4o", "no-such-model-1"))

    answer = run("check")

    assert answer.code == 0
    assert "warning: " in answer.out
    assert "no-such-model-1" in answer.out


@pytest.mark.parametrize("command", ["check", "report", "events", "verify", "migrate"])
def test_without_a_configuration_a_command_cannot_work(folder: Path, run: Run, command: str) -> None:
    answer = run(command)

    assert answer.code == 2
    assert answer.out == ""
    assert "llm-guard-mw init" in answer.err


@pytest.mark.parametrize("command", ["report", "events", "verify", "migrate"])
def test_a_configuration_with_mistakes_ends_the_other_commands(folder: Path, run: Run, command: str) -> None:
    (folder / "llm_guard.toml").write_text('timezone = "Mars/Olympus"\n')

    answer = run(command, "--format", "json")

    assert (answer.code, answer.out) == (2, "")
    assert "Mars/Olympus" in answer.err


def test_a_word_that_no_command_knows_is_wrong_usage(configured: Path, run: Run) -> None:
    assert run("reprot").code == 2
    assert run("report", "--format", "xml").code == 2


# ---------------------------------------------------------------- report, events


def test_report_drains_first_and_names_who_spent_what(bench: Bench, run: Run) -> None:
    bench.exchange(feature="chat", cost_nanos=1_500_000_001, tags={"team": "blue"})
    bench.exchange(feature="search", cost_nanos=1, tags={"team": "red"})

    answer = run("report", "--by", "feature,tag:team", "--format", "json")

    assert answer.code == 0
    assert json.loads(answer.out, parse_float=str) == [
        {
            "feature": "chat",
            "tag:team": "blue",
            "calls": 1,
            "input_tokens": 10,
            "output_tokens": 5,
            "cost_nanos": 1_500_000_001,
            "cost_usd": "1.500000001",
        },
        {
            "feature": "search",
            "tag:team": "red",
            "calls": 1,
            "input_tokens": 10,
            "output_tokens": 5,
            "cost_nanos": 1,
            "cost_usd": "1E-9",
        },
    ]


def test_report_speaks_all_formats(bench: Bench, run: Run) -> None:
    bench.exchange(user="alice", cost_nanos=20_000_000)
    bench.exchange(user="bob", cost_nanos=None)

    lines = run("report", "--by", "user", "--format", "jsonl").out
    table = run("report", "--by", "user", "--format", "csv").out
    people = run("report", "--by", "user").out

    assert [json.loads(line)["user"] for line in lines.splitlines()] == ["alice", "bob"]
    assert table.splitlines() == [
        "user,calls,input_tokens,output_tokens,cost_nanos,cost_usd",
        "alice,1,10,5,20000000,0.020000000",
        "bob,1,10,5,,",
    ]
    assert ["alice", "1", "10", "5", "$0.02"] in [line.split() for line in people.splitlines()]
    assert ["bob", "1", "10", "5", "–"] in [line.split() for line in people.splitlines()]


def test_report_can_be_given_several_by(bench: Bench, run: Run) -> None:
    bench.exchange()

    (group,) = json.loads(run("report", "--by", "feature", "--by", "model", "-f", "json").out)

    assert list(group)[:3] == ["feature", "model", "calls"]


def test_an_empty_ledger_reports_nothing(configured: Path, run: Run) -> None:
    assert run("report", "--format", "json").out == "[]\n"
    assert run("report", "--format", "jsonl").out == ""
    assert run("report", "--format", "csv").out.splitlines() == [
        "feature,calls,input_tokens,output_tokens,cost_nanos,cost_usd"
    ]
    assert "Nothing is in the books yet" in run("report").out
    assert run("events", "--format", "json").out == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("report", "--by", "colour"), "cannot report by 'colour'"),
        (("report", "--since", "soon"), "'soon' is no moment"),
        (("events", "--since", "soon"), "'soon' is no moment"),
    ],
)
def test_a_question_that_cannot_be_asked_is_wrong_usage(
    configured: Path, run: Run, arguments: tuple[str, ...], reason: str
) -> None:
    answer = run(*arguments, "--format", "json")

    assert (answer.code, answer.out) == (2, "")
    assert reason in answer.err


def test_events_are_usage_events_one_a_line(bench: Bench, run: Run) -> None:
    bench.exchange("a/0", tags={"team": "blue"})
    bench.exchange("b/0")

    found = [json.loads(line) for line in run("events", "--format", "jsonl").out.splitlines()]

    assert [event["call_id"] for event in found] == ["a", "b"]
    assert list(found[0]) == list(UsageEvent.__struct_fields__)
    assert found[0]["at"] == "2025-10-09T12:00:00.000000Z"
    assert found[0]["tags"] == {"team": "blue"}


def test_events_speak_all_formats(bench: Bench, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_guard_mw.cli.output._BATCH", 2)
    monkeypatch.setattr("llm_guard_mw.cli.output.TABLE_MAX", 3)
    for _ in range(5):
        bench.exchange(tags={"team": "blue"})

    whole = json.loads(run("events", "--format", "json").out)
    table = list(csv.DictReader(io.StringIO(run("events", "--format", "csv").out)))
    people = run("events")

    assert (len(whole), len(table)) == (5, 5)
    assert table[0]["tags"] == '{"team":"blue"}'
    assert table[0]["exact"] == "false"
    assert len(people.out.splitlines()) == 4
    assert "The last 3 of 5" in people.err


def test_a_name_cannot_steer_the_terminal(bench: Bench, run: Run) -> None:
    bench.exchange(user="\x1b[2Jalice\u202e")

    answer = run("report", "--by", "user")

    assert "\ufffd[2Jalice\ufffd" in answer.out
    assert "\x1b" not in answer.out


# ---------------------------------------------------------------- verify, migrate


def test_verify_is_good_when_the_books_add_up(bench: Bench, run: Run) -> None:
    bench.exchange()
    bench.hold()
    bench.store.renew([], [], 0)

    answer = run("verify", "--format", "json")

    # The bench's clock stands in the past: for the command, the open hold has been abandoned.
    assert answer.code == 0
    assert json.loads(answer.out) == {"ok": True, "drift_nanos": 0, "open_holds": 0, "findings": []}
    assert "The books add up" in run("verify").out


def test_verify_ends_with_one_when_they_do_not(bench: Bench, configured: Path, run: Run) -> None:
    bench.exchange()
    with sqlite3.connect(configured / "guard.db") as damage:
        damage.execute("UPDATE balances SET spent = spent + 11 WHERE name = ?", (DAY_BUDGET,))
    damage.close()

    answer = run("verify", "--format", "json")
    people = run("verify")
    table = run("verify", "--format", "csv")

    assert (answer.code, people.code, table.code) == (1, 1, 1)
    found = json.loads(answer.out)
    assert list(found) == ["ok", "drift_nanos", "open_holds", "findings"]
    assert (found["ok"], found["drift_nanos"]) == (False, 11)
    assert "The books do not add up: 1 findings, drift $0.000000011" in people.out
    assert table.out.splitlines()[0] == "kind,balance,expected,actual,message"


def test_migrate_says_where_the_ledger_is(configured: Path, run: Run) -> None:
    answer = run("migrate", "--format", "json")

    assert answer.code == 0
    assert json.loads(answer.out) == {"ledger": "sqlite:///guard.db", "revision": "0001"}


def test_a_ledger_that_is_away_is_said_without_its_password(configured: Path, run: Run) -> None:
    text = (configured / "llm_guard.toml").read_text()
    away = f'ledger = "postgresql://guard:secret@/books?host={configured}"'
    (configured / "llm_guard.toml").write_text(text.replace('ledger = "sqlite:///guard.db"', away))

    answer = run("report", "--format", "json")

    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("llm-guard-mw: ledger postgresql+psycopg://guard:***@")
    assert "secret" not in answer.err


# ---------------------------------------------------------------- as programs run it


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    code = "from llm_guard_mw.cli import app; app()"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments], cwd=folder, capture_output=True, text=True, timeout=60
    )


def test_with_a_format_for_programs_logs_go_to_standard_error(bench: Bench, configured: Path) -> None:
    bench.exchange(input_tokens=2**70)

    answer = command("events", "--format", "jsonl", folder=configured)

    assert (answer.returncode, answer.stdout) == (0, "")
    assert json.loads(answer.stderr)["event"] == "journal_entry_put_aside"


def test_help_imports_no_sql_and_no_prices() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from llm_guard_mw.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "assert not {'sqlalchemy', 'sqlmodel', 'alembic', 'genai_prices', 'tiktoken', 'pydantic'} & set(sys.modules)\n"
    )

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_commands_run_beside_live_processes(bench: Bench, configured: Path) -> None:
    from llm_guard_mw.stores.sqlite import wall_clock_ms

    bench.clock.now = wall_clock_ms()
    stop = threading.Event()

    def live() -> None:
        while not stop.is_set():
            bench.exchange()
            bench.ledger.drain(bench.store, 50)

    worker = threading.Thread(target=live)
    worker.start()
    try:
        answers = [command(name, "--format", "json", folder=configured) for name in ("verify", "report", "events")]
    finally:
        stop.set()
        worker.join()

    assert [answer.returncode for answer in answers] == [0, 0, 0], [answer.stderr for answer in answers]
    assert json.loads(answers[0].stdout)["findings"] == []
    assert [answer.stderr for answer in answers] == ["", "", ""]

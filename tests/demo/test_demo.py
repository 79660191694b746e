"""The demo as a newcomer runs it: its own process, small, and what it prints held against the books it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llm_guard_mw.cli.demo import stage
from llm_guard_mw.cli.demo.crowd import PEOPLE, asks
from llm_guard_mw.cli.demo.outcome import Outcome, Sold, invoice
from llm_guard_mw.cli.demo.standin import Row
from llm_guard_mw.ledger import Verification

CALLS = 200


def cli(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from llm_guard_mw.cli import app; app()", *arguments]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environ}, capture_output=True, text=True, timeout=120
    )


@dataclass(frozen=True)
class Run:
    folder: Path  # with the books
    table: str
    code: int

    def ask(self, *arguments: str) -> Any:
        answer = cli(self.folder, *arguments, "--format", "json")
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout, parse_float=str)

    def rows(self, title: str) -> list[list[str]]:
        """The cells of a printed table, without its heading. Cells are two blanks apart."""
        part = self.table.split(f"\n{title}\n")[1].split("\n\n")[0]
        return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in part.splitlines()[1:]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("demo") / "kept"
    # Settings of the caller's own that must reach neither the app nor the books.
    foreign = {"OPENAI_API_KEY": "sk-real", "LLM_GUARD_MODE": "observe", "HTTP_PROXY": "http://127.0.0.1:9"}
    answer = cli(folder.parent, "demo", "--calls", str(CALLS), "--keep", str(folder), **foreign)
    assert answer.stderr == ""
    return Run(folder, answer.stdout, answer.returncode)


def test_the_demo_ends_well_only_because_its_books_add_up(run: Run) -> None:
    assert run.code == 0
    assert "equals our books to the nano-dollar" in run.table
    assert "verify: balances, holds, rows and sums agree" in run.table
    assert run.ask("verify") == {"ok": True, "drift_nanos": 0, "open_holds": 0, "findings": []}


def test_every_request_was_answered_or_refused(run: Run) -> None:
    answered, refused = (int(run.table.split(f" {word}")[0].split()[-1]) for word in ("answered", "refused."))

    assert answered + refused == CALLS
    assert answered == sum(group["calls"] for group in run.ask("report", "--by", "user"))
    assert refused == sum(int(row[4]) for row in run.rows("Who was refused, and why"))


def test_who_spent_what_is_what_the_ledger_says(run: Run) -> None:
    printed = {tuple(row[:4]): (row[4], row[7]) for row in run.rows("Who spent what")}

    groups = run.ask("report", "--by", "tenant,user,feature,model")

    assert {tuple(group[name] for name in ("tenant", "user", "feature", "model")) for group in groups} == set(printed)
    for group in groups:
        calls, cost = printed[group["tenant"], group["user"], group["feature"], group["model"]]
        assert calls == str(group["calls"])
        assert abs(float(cost.removeprefix("$")) - float(group["cost_usd"])) < 1e-6


def test_the_list_of_models_is_exact_to_the_nano_dollar(run: Run) -> None:
    printed = {row[0]: row for row in run.rows("Do the books add up? (in nano-dollars)") if len(row) == 7}

    for group in run.ask("report", "--by", "model"):
        row = printed[group["model"]]
        assert row[5] == row[6] == f"{group['cost_nanos']:,}"
        assert int(row[1]) == group["calls"]


def test_budgets_bite(run: Run) -> None:
    codes = Counter(row[3] for row in run.rows("Who was refused, and why"))

    assert codes["budget_spent"]
    assert "\nHTTP/1.1 429 Too Many Requests\n" in run.table
    assert "\nretry-after: " in run.table
    assert "\nx-llm-guard-decision: reject\n" in run.table


def test_it_fits_a_terminal(run: Run) -> None:
    shown = run.table.split("\nYour own app\n")[0]  # below it the folder's name stands

    assert [line for line in shown.splitlines() if len(line.rstrip()) > 100] == []


def test_programs_get_the_same_as_data(tmp_path: Path) -> None:
    answer = cli(tmp_path, "demo", "--calls", "30", "--seed", "3", "--format", "json")

    found = json.loads(answer.stdout)
    assert answer.returncode == 0, answer.stderr
    assert found["ok"] is True
    assert found["answered"] + found["refused"] == 30
    assert found["provider_nanos"] == found["books_nanos"] == sum(row["cost_nanos"] for row in found["spent"])
    assert found["verify"] == {"ok": True, "drift_nanos": 0, "open_holds": 0}
    assert list(tmp_path.iterdir()) == []


def test_books_that_are_there_are_not_mixed_with_new_ones(run: Run) -> None:
    answer = cli(run.folder, "demo", "--calls", "1", "--keep", ".")

    assert answer.returncode == 2
    assert "is there already" in answer.stderr


# ---------------------------------------------------------------- parts


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['anthropic'] = None; sys.modules['google.genai'] = None; "
    command = [sys.executable, "-c", f"{hidden}from llm_guard_mw.cli import app; app()", "demo"]

    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert answer.returncode == 2
    assert "the demo needs anthropic, google.genai: pip install 'llm_guard_mw[demo]'" in answer.stderr


def test_an_app_that_does_not_start_is_told_with_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "main.py").write_text("raise SystemExit('no such luck')\n")
    (tmp_path / "llm_guard.toml").write_text("")
    monkeypatch.setattr(stage, "example_app", lambda: tmp_path)

    with pytest.raises(stage.DemoFailed, match="no such luck"), stage.set_up():
        pass


def test_nothing_outlives_the_demo() -> None:
    with stage.set_up() as set_up:
        process, folder = set_up.process, set_up.config.parent

    assert process.poll() is not None
    assert not folder.exists()


def test_a_demo_that_is_ended_takes_its_servers_with_it(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from llm_guard_mw.cli import app; app()",
        "demo",
        "--calls",
        "9999",
        "--keep",
        "d",
    ]
    running = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, stdout=subprocess.PIPE)
    books = tmp_path / "d" / stage.BOOKS
    until = time.monotonic() + 60
    while not books.exists() and time.monotonic() < until:
        assert running.poll() is None
        time.sleep(0.05)

    running.terminate()

    assert running.communicate(timeout=60)[0] == b""
    assert running.returncode == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):  # nobody is left of its process group
        os.killpg(running.pid, 0)


def test_the_same_seed_asks_the_same() -> None:
    assert asks(100, 5) == asks(100, 5)
    assert asks(100, 5) != asks(100, 6)


@pytest.mark.parametrize("calls", [1, 2, 17, 300, 1001])
def test_all_calls_are_handed_out(calls: int) -> None:
    assert sum(person.share for person in PEOPLE) == 100
    assert sum(len(wanted) for wanted in asks(calls, 1).values()) == calls


def test_the_list_price_is_rounded_once_a_request() -> None:
    row = Row("a", "openai.chat", "gpt-4o", input_tokens=2000, cached_tokens=1024, output_tokens=3)

    # 976 x $2.50 + 1024 x $1.25 + 3 x $10.00, a million
    assert invoice([row, row]) == {"gpt-4o": Sold(2, 4000, 6, 2048, 2 * 3_750_000)}


def outcome(**changes: Any) -> Outcome:
    good: dict[str, Any] = {
        "calls": 3,
        "seconds": 1.0,
        "answers": (),
        "spent": [],
        "provider": {"gpt-4o": Sold(2, 20, 10, 0, 500)},
        "books": {"gpt-4o": Sold(2, 20, 10, 0, 500)},
        "verification": Verification(ok=True, drift_nanos=0, open_holds=0, findings=()),
        "statuses": Counter({200: 2, 429: 1}),
    }
    return Outcome(**{**good, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"books": {"gpt-4o": Sold(2, 20, 10, 0, 501)}},
        {"books": {"gpt-4o-mini": Sold(2, 20, 10, 0, 500)}},
        {"statuses": Counter({200: 2, 500: 1})},
        {"statuses": Counter({200: 1, 429: 2})},
        {"calls": 4},
        {"verification": Verification(ok=False, drift_nanos=1, open_holds=0, findings=({},))},
    ],
)
def test_one_nano_dollar_or_one_call_amiss_is_a_finding(changes: dict[str, Any]) -> None:
    assert outcome().good
    assert not outcome(**changes).good


def test_the_example_is_found() -> None:
    assert {"main.py", "provider.py", "llm_guard.toml"} <= {path.name for path in stage.example_app().iterdir()}

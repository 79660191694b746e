"""Each test has a folder of its own, with a configuration, a store and a ledger in it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llm_guard_mw.cli import app
from tests.ledger.bench import Bench, new_bench

CONFIG = """
store = "sqlite:///guard.db"
ledger = "sqlite:///guard.db"
limits = ["$5/day global"]

[[routes]]
path = "/api/chat"
name = "chat"
feature = "chat"
model = "gpt-4o"
limits = ["$2/day per user", { limit = "5 requests/minute per user", when = { tier = "free" } }]
"""


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """The commands configure logging for the whole process, which other tests share."""
    root, ours = logging.getLogger(), logging.getLogger("llm_guard")
    before = (root.handlers[:], root.level, ours.handlers[:], ours.propagate)
    yield
    root.handlers[:], root.level, ours.handlers[:], ours.propagate = before


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def configured(folder: Path) -> Path:
    (folder / "llm_guard.toml").write_text(CONFIG)
    return folder


@pytest.fixture
def bench(configured: Path) -> Iterator[Bench]:
    """What a live process would hold: the store and the ledger that the configuration names."""
    bench = new_bench(configured / "guard.db", f"sqlite:///{configured}/guard.db")
    yield bench
    bench.close()


class Answer:
    """What a command wrote, and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err


@pytest.fixture
def run() -> Callable[..., Answer]:
    def run(*arguments: str) -> Answer:
        result = CliRunner().invoke(app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Answer(result.exit_code, result.stdout, result.stderr)

    return run

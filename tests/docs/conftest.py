"""A folder to be in, and a stand-in provider that the SDKs find through the environment."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from llm_guard_mw import process
from llm_guard_mw.cli.demo.standin import StandIn, running


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    app = StandIn()
    with running(app) as url:
        settings = {
            "OPENAI_API_KEY": "none",
            "OPENAI_BASE_URL": f"{url}/v1",
            "ANTHROPIC_API_KEY": "none",
            "ANTHROPIC_BASE_URL": url,
            "GEMINI_API_KEY": "none",
            "GOOGLE_GEMINI_BASE_URL": url,
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        yield app


@pytest.fixture
def as_it_was() -> Iterator[None]:
    """What snippets set up for their process is undone: the guard, logging, structlog."""
    ours = logging.getLogger("llm_guard")
    before = ours.level, ours.handlers[:], ours.propagate
    yield
    process.uninstall()
    structlog.reset_defaults()
    ours.level, ours.handlers, ours.propagate = before

"""The servers of the demo: the stand-in provider in a thread, the example app in a uvicorn process of its own.

Rule 1. Nothing leaves this machine: whatever keys, addresses and proxies the environment has are not passed on.
Rule 2. Books and balances live in a temporary folder that is gone when the demo is, unless one is named to keep.
Rule 3. What was started is ended by its process id, whatever happens.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llm_guard_mw.cli.demo.crowd import wait_until_healthy
from llm_guard_mw.cli.demo.standin import Knobs, StandIn, running
from llm_guard_mw.errors import GuardError

HOST = "127.0.0.1"
BOOKS = "llm_guard.db"
START_SECONDS = 60
END_SECONDS = 10

#: What the example app imports; the extra `demo` brings it.
_NEEDED = ("fastapi", "uvicorn", "openai", "anthropic", "google.genai")

#: Settings that would send the SDKs or the guard elsewhere.
_FOREIGN = re.compile(r"(OPENAI|ANTHROPIC|GOOGLE|GEMINI|LLM_GUARD|STANDIN)_|(HTTP|HTTPS|ALL|NO)_PROXY$", re.IGNORECASE)

#: A provider takes its time; so does the stand-in, a little.
_PACE = Knobs(first_byte_ms=20)


class DemoFailed(GuardError):
    """The demo could not be shown: the message says why."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Where everything is while the demo runs."""

    port: int  # of the example app
    provider: StandIn
    config: Path
    environ: dict[str, str]  # the configuration's overrides: where its books are
    process: subprocess.Popen[bytes]

    def end_app(self) -> None:
        """End the app in good order: what it still holds is settled, and written down."""
        _end(self.process)


def missing_packages() -> list[str]:
    return [name for name in _NEEDED if not _is_there(name)]


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def example_app() -> Path:
    """examples/fastapi_app: inside of an installed wheel, or beside the package in a checkout."""
    here = Path(__file__).resolve()
    for place in (here.with_name("fastapi_app"), here.parents[3] / "examples" / "fastapi_app"):
        if (place / "main.py").is_file():
            return place
    raise DemoFailed("the example app is not there: neither in this package, nor in examples/fastapi_app beside it")


@contextmanager
def set_up(keep: Path | None = None) -> Iterator[Stage]:
    """Both servers, up and listening; gone at the end of the block. `keep`: a folder that the books stay in."""
    app, provider = example_app(), StandIn(_PACE)
    with _ending_in_order(), _folder(keep) as folder, running(provider, host=HOST) as url:
        books = f"sqlite:///{(folder / BOOKS).as_posix()}"
        config = Path(shutil.copy(app / "llm_guard.toml", folder))
        environ = {"LLM_GUARD_STORE": books, "LLM_GUARD_LEDGER": books}
        port, log = _free_port(), folder / "app.log"
        process = _start(app, port, log, {**_own_environment(), **environ, "STANDIN_URL": url})
        try:
            if not wait_until_healthy(HOST, port, START_SECONDS, lambda: process.poll() is not None):
                raise DemoFailed(f"the example app did not start:\n{log.read_text(errors='replace')[-2000:]}")
            yield Stage(port, provider, config, environ, process)
        finally:
            _end(process)


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """A SIGTERM unwinds the block, or the app would go on without us."""

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        # On Windows a file that somebody still holds open cannot be removed; the system's own cleaning takes it then.
        with tempfile.TemporaryDirectory(prefix="llm-guard-demo-", ignore_cleanup_errors=True) as folder:
            yield Path(folder).resolve()
        return
    if (keep / BOOKS).exists():
        raise DemoFailed(f"{keep / BOOKS} is there already: name another folder, or remove it")
    try:
        keep.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoFailed(f"{keep} cannot be made: {error.strerror}") from error
    yield keep.resolve()


def _own_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not _FOREIGN.match(name)}


def _start(app: Path, port: int, log: Path, environ: dict[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "uvicorn", "main:app", "--app-dir", str(app), "--host", HOST, "--port", str(port)]
    quiet = ["--log-level", "warning", "--no-access-log", "--no-proxy-headers"]
    with log.open("wb") as sink:
        return subprocess.Popen(  # noqa: S603 - our own interpreter, and arguments of our own
            [*command, *quiet], cwd=log.parent, env=environ, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port

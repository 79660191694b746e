"""The command line: `llm-guard-mw`. docs/reference/cli.md describes every command.

Rule 1. A command imports what it needs when it runs, so that `--help` is there at once.
Rule 2. Exit codes: 0 good, 1 a finding, 2 the command could not do its work (wrong usage, nothing to reach).
Rule 3. `events`, `report` and `verify` drain the journal first, and run beside live processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from llm_guard_mw.cli.output import Format, dollars, say, show_table, write_record, write_records

if TYPE_CHECKING:
    from llm_guard_mw.config import Config
    from llm_guard_mw.errors import Mistake
    from llm_guard_mw.ledger import Ledger, Verification
    from llm_guard_mw.stores.protocol import Store

FINDING = 1
FAILED = 2

app = typer.Typer(
    name="llm-guard-mw",
    help="The spend guard in front of your AI routes: set it up, and read what it has written down.",
    no_args_is_help=True,
    add_completion=False,
    # A traceback with local variables could show a key.
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[Path, typer.Option("--config", "-c", help="The configuration file.", show_default=True)]
Output = Annotated[Format, typer.Option("--format", "-f", help="table for people, the others for programs.")]
Since = Annotated[str | None, typer.Option(help="From then on: 2026-11-01, an RFC 3339 time, 24h, 7d.")]
Until = Annotated[str | None, typer.Option(help="Up to then, but not then itself.")]

_CONFIG = Path("llm_guard.toml")


# ---------------------------------------------------------------- setting up


@app.command()
def init(
    config: ConfigPath = _CONFIG,
    form: Output = Format.TABLE,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write a commented configuration to start from."""
    from llm_guard_mw.config import sample_config

    try:
        with config.open("w" if force else "x", encoding="utf-8") as file:
            file.write(sample_config())
    except FileExistsError:
        _fail(f"{config} is there already: name another one with --config, or write over it with --force")
    except OSError as error:
        _fail(f"{config} cannot be written: {error.strerror}")

    def told() -> None:
        typer.echo(f"Wrote {config}. Change what you like, then run: llm-guard-mw check {config}")

    write_record({"written": str(config)}, form, told)


@app.command()
def check(
    file: Annotated[Path | None, typer.Argument(help="The file to check, rather than --config.")] = None,
    config: ConfigPath = _CONFIG,
    form: Output = Format.TABLE,
) -> None:
    """Find every mistake of a configuration in one run: file, line, value, fix."""
    from llm_guard_mw.config import load_config
    from llm_guard_mw.errors import ConfigError

    path = file or config
    if not path.is_file():
        _fail(f"there is no file {path}: `llm-guard-mw init` writes one to start with")
    _configure_logs()
    loaded: Config | None = None
    mistakes: Sequence[Mistake] = ()
    try:
        loaded = load_config(path, check=True)
    except ConfigError as error:
        mistakes = error.mistakes
    warnings = loaded.warnings if loaded is not None else ()
    record = {
        "ok": not mistakes,
        "mistakes": [asdict(mistake) for mistake in mistakes],
        "warnings": [asdict(warning) for warning in warnings],
    }
    if form in (Format.JSONL, Format.CSV):
        notes = [("mistake", mistake) for mistake in mistakes] + [("warning", warning) for warning in warnings]
        columns = ("severity", "where", "problem", "fix")
        records = ({"severity": severity, **asdict(note)} for severity, note in notes)
        write_records(records, form, columns, shown=columns)
    else:
        write_record(record, form, lambda: _show_check(path, loaded, mistakes, warnings))
    if mistakes:
        raise typer.Exit(FINDING)


def _show_check(path: Path, loaded: Config | None, mistakes: Sequence[Mistake], warnings: Sequence[Mistake]) -> None:
    for severity, notes in (("mistake", mistakes), ("warning", warnings)):
        for note in notes:
            typer.echo(f"{severity}: {note.where}: {note.problem}")
            if note.fix:
                typer.echo(f"    fix: {note.fix}")
    if loaded is None:
        typer.echo(f"{path}: {len(mistakes)} {'mistake' if len(mistakes) == 1 else 'mistakes'}")
        return
    rows = list(_guarded(loaded))
    show_table(("guards", "requests", "limit", "for"), rows)
    rest = f", {len(warnings)} warning{'s' if len(warnings) != 1 else ''}" if warnings else ""
    typer.echo(f"{path} is good{rest}. Mode: {loaded.policy.mode}.")


def _guarded(loaded: Config) -> Iterator[tuple[str, str, str, str]]:
    """What will be guarded, a limit a row: where it stands, what it counts, itself, and for whom it is."""
    policy = loaded.policy
    for route in policy.routes:
        requests = f"{'/'.join(sorted(route.methods))} {route.path}"
        for limit in route.limits or (None,):
            yield f"route {route.name}", requests, limit.text if limit else "no limit of its own", _whom(limit)
    places = [("all", policy.limits), *((f"tier {name}", limits) for name, limits in policy.tiers.items())]
    for place, limits in places:
        for limit in limits:
            yield place, "all guarded calls", limit.text, _whom(limit)


def _whom(limit: Any) -> str:  # a balances.Limit, or None; importing it would slow --help
    if limit is None:
        return "everybody"
    conditions = [f"{key} = {' or '.join(sorted(values))}" for key, values in limit.conditions]
    return ", ".join(conditions) or "everybody"


@app.command()
def migrate(config: ConfigPath = _CONFIG, form: Output = Format.TABLE) -> None:
    """Bring the ledger's tables up to date. Any number of processes may do so at once."""
    with _opened(config) as (ledger, _):
        revision = ledger.migrate()
        name = ledger.database.name
    write_record({"ledger": name, "revision": revision}, form, lambda: typer.echo(f"{name} is at revision {revision}."))


# ---------------------------------------------------------------- reading the books

_EVENT_SHOWN = (
    "at", "kind", "tenant", "user", "feature", "model", "decision", "input_tokens", "output_tokens", "cost", "status",
)  # fmt: skip


@app.command()
def report(
    by: Annotated[
        list[str] | None, typer.Option(help="What to group by: feature,model,user,tenant,tag:NAME,day, ...")
    ] = None,
    since: Since = None,
    until: Until = None,
    config: ConfigPath = _CONFIG,
    form: Output = Format.TABLE,
) -> None:
    """Say who spent what, the dearest first."""
    names = [name.strip() for written in by or ["feature"] for name in written.split(",") if name.strip()]
    with _opened(config) as (ledger, store):
        ledger.drain_all(store)
        groups = _asked(lambda: ledger.report(names, since, until))
    columns = [*dict.fromkeys(names), "calls", "input_tokens", "output_tokens", "cost_nanos", "cost_usd"]
    if form is Format.TABLE and not groups:
        typer.echo("Nothing is in the books" + (" of that time." if since or until else " yet."))
        return
    write_records(groups, form, columns, shown=[name for name in columns if name != "cost_nanos"])


@app.command()
def events(
    since: Since = None,
    until: Until = None,
    config: ConfigPath = _CONFIG,
    form: Output = Format.TABLE,
) -> None:
    """List the exchanges, one UsageEvent each, by time."""
    from llm_guard_mw.ledger.rows import EVENT_FIELDS

    with _opened(config) as (ledger, store):
        found = _asked(lambda: ledger.events(since, until))
        ledger.drain_all(store)
        records = (_with_dollars(event) for event in found) if form is Format.TABLE else found
        write_records(records, form, EVENT_FIELDS, shown=_EVENT_SHOWN)


def _with_dollars(event: dict[str, Any]) -> dict[str, Any]:
    from decimal import Decimal

    nanos = event["cost_nanos"]
    return {**event, "cost": None if nanos is None else Decimal(nanos).scaleb(-9), "status": _code(event["status"])}


def _code(status: int | None) -> str | None:
    return None if status is None else str(status)


@app.command()
def verify(config: ConfigPath = _CONFIG, form: Output = Format.TABLE) -> None:
    """Prove that the books add up: the store's balances against the ledger, and the ledger against itself."""
    from llm_guard_mw.ledger import verify as verify_books

    with _opened(config) as (ledger, store):
        found = verify_books(store, ledger)
    record = {
        "ok": found.ok,
        "drift_nanos": found.drift_nanos,
        "open_holds": found.open_holds,
        "findings": list(found.findings),
    }
    write_record(record, form, lambda: _show_verification(found), rows="findings")
    if not found.ok:
        raise typer.Exit(FINDING)


def _show_verification(found: Verification) -> None:
    from decimal import Decimal

    holds = f"{found.open_holds} open {'hold' if found.open_holds == 1 else 'holds'}"
    if found.ok:
        typer.echo(f"The books add up. Drift: none, {holds}.")
        return
    columns = ("kind", "expected", "actual", "message")
    show_table(columns, [[finding[name] for name in columns] for finding in found.findings])
    drift = dollars(Decimal(found.drift_nanos).scaleb(-9))
    typer.echo(f"The books do not add up: {len(found.findings)} findings, drift {drift}, {holds}.")


# ---------------------------------------------------------------- in the background


@app.command()
def worker(config: ConfigPath = _CONFIG, form: Output = Format.TABLE) -> None:
    """Drain, sweep and prune in a process of their own, until it is told to stop."""
    import logging
    import signal
    import threading

    from llm_guard_mw.worker import Worker

    stopping = threading.Event()

    def stop(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # who asks twice does not want to wait
        stopping.set()

    for asked in (signal.SIGTERM, signal.SIGINT):
        signal.signal(asked, stop)
    with _put_together(config, logging.INFO) as (loaded, ledger, store):
        policy = loaded.policy
        work = Worker(store, ledger, lease_seconds=policy.lease_seconds, retention_days=policy.retention_days).run(
            stopping
        )
    write_record(asdict(work), form, lambda: None)


# ---------------------------------------------------------------- the demo


@app.command()
def demo(
    calls: Annotated[int, typer.Option(min=1, max=10_000, help="How many requests are sent.")] = 300,
    seed: Annotated[int, typer.Option(help="The same seed asks the same.")] = 1,
    keep: Annotated[Path | None, typer.Option(help="A folder for the configuration and the books to stay in.")] = None,
    form: Output = Format.TABLE,
) -> None:
    """Let a few people spend in an example app until budgets bite, and show the books. Needs no key."""
    from llm_guard_mw.cli.demo.stage import DemoFailed, missing_packages

    missing = missing_packages()
    if missing:
        _fail(f"the demo needs {', '.join(missing)}: pip install 'llm_guard_mw[demo]'")
    from llm_guard_mw.cli.demo.outcome import as_record, play
    from llm_guard_mw.cli.demo.show import show

    _configure_logs()
    try:
        outcome = play(calls, seed, keep)
    except DemoFailed as error:
        _fail(str(error))
    write_record(as_record(outcome), form, lambda: show(outcome, keep), rows="spent")
    if not outcome.good:
        raise typer.Exit(FINDING)


# ---------------------------------------------------------------- around a command


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Ledger, Store]]:
    """The ledger and the store that a configuration names; what cannot be reached ends the command."""
    with _put_together(path) as (_, ledger, store):
        yield ledger, store


@contextmanager
def _put_together(path: Path, log_level: int | None = None) -> Iterator[tuple[Config, Ledger, Store]]:
    from llm_guard_mw.config import load_config
    from llm_guard_mw.errors import ConfigError, GuardError
    from llm_guard_mw.ledger import Ledger
    from llm_guard_mw.spool import Spool, spool_folder
    from llm_guard_mw.stores import open_store

    _configure_logs(log_level)
    try:
        loaded = load_config(path)
        ledger = Ledger(loaded.ledger, timezone=loaded.policy.timezone)
        store = open_store(loaded.store, journal_max=loaded.policy.journal_max)
        spool = Spool(spool_folder(loaded.store, loaded.ledger, loaded.source, os.environ), store)
        try:
            spool.replay()  # of processes that are gone
            yield loaded, ledger, store
        finally:
            spool.close()
            ledger.close()
            store.close()
    except ConfigError as error:
        for mistake in error.mistakes:
            say(f"mistake: {mistake}")
        raise typer.Exit(FAILED) from error
    except GuardError as error:
        _fail(str(error))


def _asked(question: Any) -> Any:  # whatever the question's answer is
    """The answer, or the reason why the question cannot be asked."""
    try:
        return question()
    except ValueError as error:
        _fail(str(error))


def _fail(reason: str) -> NoReturn:
    say(f"llm-guard-mw: {reason}")
    raise typer.Exit(FAILED)


def _configure_logs(level: int | None = None) -> None:
    import logging

    from llm_guard_mw import logs

    logs.configure(logging.WARNING if level is None else level)

"""The schema: made at first use, once, by whoever comes first; and never by guesswork."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from llm_guard_mw.errors import ConfigError, LedgerUnavailable
from llm_guard_mw.ledger import Ledger
from llm_guard_mw.ledger.database import HEAD, VERSION_TABLE
from llm_guard_mw.ledger.tables import METADATA


def version_says(ledger: Ledger, version: str) -> None:
    with ledger.database.writing() as connection:
        connection.exec_driver_sql(f"UPDATE {VERSION_TABLE} SET version_num = '{version}'")


def test_the_migrations_end_at_the_tables_of_the_code(ledger_url: str) -> None:
    ledger = Ledger(ledger_url)
    ledger.migrate()

    with ledger.database.reading() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "version_table": VERSION_TABLE, "target_metadata": METADATA}
        )
        assert compare_metadata(context, METADATA) == []
    ledger.close()


def test_the_head_that_the_code_names_is_that_of_the_scripts() -> None:
    import llm_guard_mw.ledger

    scripts = ScriptDirectory(str(Path(llm_guard_mw.ledger.__file__).parent / "migrations"))

    assert scripts.get_heads() == [HEAD]


def test_the_first_use_makes_the_tables(ledger_url: str) -> None:
    ledger = Ledger(ledger_url)

    assert list(ledger.events()) == []
    ledger.close()


def test_migrating_twice_changes_nothing(ledger_url: str) -> None:
    ledger = Ledger(ledger_url)

    assert [ledger.migrate(), ledger.migrate()] == [HEAD, HEAD]
    ledger.close()


def _start(url: str) -> int:
    ledger = Ledger(url)
    found = len(list(ledger.events()))
    ledger.close()
    return found


def test_many_processes_may_start_at_once(ledger_url: str) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.map(_start, [ledger_url] * 8, chunksize=1) == [0] * 8


def test_many_threads_may_start_at_once(ledger_url: str) -> None:
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(_start, [ledger_url] * 8)) == [0] * 8


def test_a_newer_schema_is_refused_by_name(ledger_url: str) -> None:
    ledger = Ledger(ledger_url)
    ledger.migrate()
    version_says(ledger, "0999")
    ledger.close()

    with pytest.raises(ConfigError, match="has schema 0999, this version of llm_guard_mw knows 0001"):
        list(ledger.events())
    with pytest.raises(ConfigError, match="has schema 0999"):
        ledger.migrate()
    ledger.close()


def test_an_older_schema_on_postgres_is_the_operators_to_migrate(postgres_url: str) -> None:
    ledger = Ledger(postgres_url)
    ledger.migrate()
    version_says(ledger, "0000")
    ledger.close()

    with pytest.raises(ConfigError, match="run `llm-guard-mw migrate`"):
        list(ledger.events())
    ledger.close()


def test_tables_of_somebody_else_are_not_touched(ledger_url: str) -> None:
    ledger = Ledger(ledger_url)
    with ledger.database.engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE usage_events (mine TEXT)")

    with pytest.raises(ConfigError, match="has a table 'usage_events' that llm_guard_mw did not make"):
        list(ledger.events())
    ledger.close()


@pytest.mark.parametrize("url", ["mysql://host/db", "sqlite://", "sqlite:///:memory:", "guard.db", ""])
def test_a_url_that_is_no_ledger_is_named_with_those_that_are(url: str) -> None:
    with pytest.raises(ConfigError, match=r"this version knows sqlite:///PATH and postgresql://"):
        Ledger(url).migrate()


def test_a_database_that_is_away_is_unavailable_and_its_password_stays_secret(tmp_path: Path) -> None:
    ledger = Ledger(f"postgresql://guard:secret@/books?host={tmp_path}")

    with pytest.raises(LedgerUnavailable) as raised:
        ledger.migrate()

    assert "secret" not in str(raised.value)
    ledger.close()


def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no database at all, but long enough to be looked at " * 50)
    ledger = Ledger(f"sqlite:///{tmp_path}/notes.txt")

    with pytest.raises(LedgerUnavailable, match="file is not a database"):
        ledger.migrate()
    ledger.close()


def test_the_store_and_the_ledger_share_a_file_whoever_comes_first(tmp_path: Path) -> None:
    from llm_guard_mw.stores.sqlite import SQLiteStore

    for first in ("store", "ledger"):
        ledger = Ledger(f"sqlite:///{tmp_path}/{first}.db")
        store = SQLiteStore(tmp_path / f"{first}.db")
        if first == "ledger":
            ledger.migrate()

        assert ledger.drain(store) == 0
        assert list(ledger.events()) == []
        ledger.close()
        store.close()


def test_a_commit_is_on_the_disk_before_a_store_elsewhere_trims_its_journal(tmp_path: Path) -> None:
    from llm_guard_mw.stores.sqlite import SQLiteStore

    hardness = {}
    for name in ("shared", "apart"):
        store = SQLiteStore(tmp_path / f"{name if name == 'shared' else 'store'}.db")
        store.epoch()
        ledger = Ledger(f"sqlite:///{tmp_path}/{name}.db")
        with ledger.database.reading() as connection:
            hardness[name] = connection.exec_driver_sql("PRAGMA synchronous").scalar_one()
        ledger.close()
        store.close()

    normal, full = 1, 2
    assert hardness == {"shared": normal, "apart": full}


def test_importing_and_making_a_ledger_imports_no_sql() -> None:
    code = (
        "import sys; from llm_guard_mw.ledger import Ledger, verify; Ledger('sqlite:///x.db');"
        "assert not {'sqlmodel', 'sqlalchemy', 'alembic', 'pydantic'} & set(sys.modules)"
    )

    subprocess.run([sys.executable, "-c", code], check=True)


def test_our_tables_are_not_among_those_of_an_app_that_uses_sqlmodel() -> None:
    from sqlmodel import SQLModel

    assert not set(METADATA.tables) & set(SQLModel.metadata.tables)


def test_a_ledger_survives_a_fork(tmp_path: Path) -> None:
    code = f"""
import os
from llm_guard_mw.ledger import Ledger
ledger = Ledger("sqlite:///{tmp_path}/guard.db")
ledger.migrate()
child = os.fork()
if child == 0:
    list(ledger.events())
    os._exit(0)
_, status = os.waitpid(child, 0)
list(ledger.events())
raise SystemExit(status)
"""

    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)

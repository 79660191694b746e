"""The database of the books: one engine, short transactions, and a schema that fits the code.

Rule 1. The file may be the store's as well, so that every write transaction is short: `BEGIN IMMEDIATE`, a few
        statements, commit. Reads see one snapshot (WAL; REPEATABLE READ on Postgres).
Rule 2. The first use of a SQLite ledger, or of a Postgres database without our tables, makes the schema. An
        older schema on Postgres is the operator's to migrate, a newer one is refused.
Rule 3. The driver's errors end here: what the machinery did wrong leaves as `LedgerUnavailable`.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import orjson
from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Engine,
    Table,
    bindparam,
    create_engine,
    event,
    func,
    inspect,
    make_url,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DatabaseError, DataError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.sql.dml import Insert

from llm_guard_mw.errors import ConfigError, LedgerUnavailable
from llm_guard_mw.ledger.tables import METADATA, LedgerFact, table_of

VERSION_TABLE = "llm_guard_alembic_version"
#: The newest revision in `migrations/versions`; numbers, so that a newer schema can be told from a strange one.
HEAD = "0001"

#: What a value can do wrong, rather than the database.
POISON = (DataError, IntegrityError, OverflowError, UnicodeError, ValueError, orjson.JSONEncodeError)

#: How long a transaction waits for another process to let go of the file.
_LOCK_WAIT_SECONDS = 10
_CONNECT_WAIT_SECONDS = 5
#: Any constant that no other program is likely to lock on: "llmguard" in ASCII.
_MIGRATION_LOCK = 0x6C6C6D6775617264
#: Alembic keeps the running migration in module globals.
_migrating = threading.Lock()


class Database:
    """One database, opened by the first use. `url` is `sqlite:///PATH` or `postgresql://…`."""

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        self.name = self.engine.url.render_as_string(hide_password=True)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self._prepared: dict[Writing, _Prepared] = {}
        self._ready = False

    # -- transactions

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One snapshot of the books."""
        self.make_ready()
        with self._transaction(_SNAPSHOT) as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction, alone at the pen where the database has just one (SQLite)."""
        self.make_ready()
        with self._transaction(_WRITE) as connection:
            yield connection

    @contextmanager
    def _transaction(self, options: dict[str, Any]) -> Iterator[Connection]:
        try:
            with self.engine.connect().execution_options(**options) as connection, connection.begin():
                yield connection
        except (OperationalError, InterfaceError, PoolTimeout) as error:
            raise self._unavailable(error) from error
        except DatabaseError as error:
            if type(error) is not DatabaseError:  # its subclasses are a value's fault, or ours
                raise
            raise self._unavailable(error) from error  # "file is not a database"

    def _unavailable(self, error: Exception) -> LedgerUnavailable:
        return LedgerUnavailable(f"ledger {self.name}: {str(getattr(error, 'orig', None) or error).strip()}")

    def insert(self, table: Table) -> sqlite.Insert | postgresql.Insert:
        """An insert that knows ON CONFLICT: both databases have it, SQLAlchemy has it once for each."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    def insert_new(self, table: Table) -> Insert:
        return self.insert(table).on_conflict_do_nothing()

    def close(self) -> None:
        self.engine.dispose()

    def write_many(self, connection: Connection, writing: Writing, rows: Sequence[Mapping[str, Any]]) -> None:
        """Run a statement for each of the rows, of which every one has a value for each column."""
        if not rows:
            return
        prepared = self._prepared.get(writing)
        if prepared is None:
            prepared = self._prepared[writing] = _Prepared(writing, self)
        prepared.run(connection, rows)

    # -- facts

    def fact(self, connection: Connection, name: str) -> str | None:
        facts = table_of(LedgerFact)
        value: str | None = connection.scalar(select(facts.c.value).where(facts.c.name == name))
        return value

    def set_facts(self, connection: Connection, values: dict[str, str]) -> None:
        statement = self.insert(table_of(LedgerFact))
        connection.execute(
            statement.on_conflict_do_update(index_elements=["name"], set_={"value": statement.excluded.value}),
            [{"name": name, "value": value} for name, value in values.items()],
        )

    # -- the schema

    def make_ready(self) -> None:
        """See to it, once a process, that the tables are there and are ours."""
        if self._ready:
            return
        with self._transaction(_SNAPSHOT) as connection:
            version = self._version(connection)
        if version is None or (self.is_sqlite and version != HEAD):
            self.migrate()
        elif version != HEAD:
            raise ConfigError(
                f"ledger {self.name} has schema {version}, this version of llm_guard_mw needs {HEAD}:"
                " run `llm-guard-mw migrate`"
            )
        self._ready = True

    def migrate(self) -> str:
        """Bring the schema to the code's revision, and say which that is. Any number of processes may ask at once."""
        with _migrating, self._transaction(_WRITE) as connection:
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            if self._version(connection) != HEAD:
                _run_migrations(connection)
        self._ready = True
        return HEAD

    def _version(self, connection: Connection) -> str | None:
        """The schema's revision; None where nothing of ours is. ConfigError for what we cannot work with."""
        present = set(inspect(connection).get_table_names())
        if VERSION_TABLE not in present:
            strange = sorted(present & set(METADATA.tables))
            if strange:
                raise ConfigError(
                    f"ledger {self.name} has a table {strange[0]!r} that llm_guard_mw did not make:"
                    " give the ledger a database (or a Postgres schema) of its own"
                )
            return None
        version = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))  # noqa: S608 - a constant
        if version is not None and version > HEAD:
            raise ConfigError(
                f"ledger {self.name} has schema {version}, this version of llm_guard_mw knows {HEAD}:"
                " use the version that migrated it, or a newer one"
            )
        return version or None


def _run_migrations(connection: Connection) -> None:
    # Alembic takes a third of a second to import, and most processes find the schema in place.
    with _quiet("alembic"):
        from alembic import command
        from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "llm_guard_mw.ledger:migrations")
    config.attributes["connection"] = connection
    with _quiet("alembic"):
        command.upgrade(config, "head")


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library's progress reports out of the host's log: a host at INFO asked for its own."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)


# ---------------------------------------------------------------- many rows of one statement


@dataclass(frozen=True, slots=True)
class Writing:
    """A Core statement that writes rows of `table`, with a value for each column but those it `leaves` to it."""

    table: Table
    statement: Callable[[Database], Insert]
    leaves: tuple[str, ...] = ()


class _Prepared:
    """A statement compiled once for a database, and its rows given to the driver as they are.

    SQLAlchemy looks at each value of each row before the driver does, and a driver for Postgres makes text of each:
    both cost more than the writing. SQLite is given tuples, Postgres one array of JSON, which it takes apart itself.
    """

    def __init__(self, writing: Writing, books: Database) -> None:
        columns = [column for column in writing.table.columns if column.name not in writing.leaves]
        names = [column.name for column in columns]
        statement = writing.statement(books)
        if not books.is_sqlite:
            rows = func.jsonb_to_recordset(bindparam("rows", type_=postgresql.JSONB()))
            typed = rows.table_valued(
                *(Column(name, c.type) for name, c in zip(names, columns, strict=True)), name="new"
            )
            statement = statement.from_select(names, select(typed.render_derived(with_types=True)))
        compiled = statement.compile(dialect=books.engine.dialect, column_keys=names)
        self.text = str(compiled)
        self.as_tuples = books.is_sqlite
        if books.is_sqlite:
            order = compiled.positiontup or []
            self.values = itemgetter(*order)
            self.json = [n for n, name in enumerate(order) if isinstance(writing.table.c[name].type, JSON)]

    def run(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        if not self.as_tuples:
            connection.exec_driver_sql(self.text, {"rows": _dumps(rows)})
            return
        values = []
        for row in rows:
            each = list(self.values(row))
            for n in self.json:
                each[n] = _dumps(each[n])
            values.append(tuple(each))
        connection.exec_driver_sql(self.text, values)


# ---------------------------------------------------------------- the engine

_BEGIN = "llm_guard_begin"
_SNAPSHOT: dict[str, Any] = {_BEGIN: "BEGIN", "llm_guard_snapshot": True}
_WRITE: dict[str, Any] = {_BEGIN: "BEGIN IMMEDIATE"}


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError(_unknown(url)) from error
    if parsed.drivername in ("sqlite", "sqlite+pysqlite") and parsed.database and parsed.database != ":memory:":
        return _sqlite_engine(url, parsed.database)
    if parsed.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return _postgres_engine(url)
    raise ConfigError(_unknown(parsed.render_as_string(hide_password=True)))


def _unknown(shown: str) -> str:
    return f"ledger = {shown!r}: this version knows sqlite:///PATH and postgresql://USER@HOST/DATABASE"


def _sqlite_engine(url: str, path: str) -> Engine:
    engine = create_engine(
        url, connect_args={"timeout": _LOCK_WAIT_SECONDS}, json_serializer=_dumps, json_deserializer=orjson.loads
    )

    def opened(connection: sqlite3.Connection, _record: object) -> None:
        # pysqlite would begin transactions by itself, and always deferred ones; we say BEGIN in `began`.
        connection.isolation_level = None
        _use_wal(connection)
        connection.execute(f"PRAGMA synchronous = {_synchronous(connection)}")

    def began(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get(_BEGIN, "BEGIN"))

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    event.listen(engine, "connect", opened)
    event.listen(engine, "begin", began)
    return engine


def _synchronous(connection: sqlite3.Connection) -> str:
    """How hard a commit has to be before the store's journal may be trimmed.

    In one file with the store, a power cut takes the later trim before it takes our commit. In a file of its own
    the commit must be on the disk first.
    """
    shared = connection.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'journal'").fetchone()
    return "NORMAL" if shared else "FULL"


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to the write-ahead log. SQLite does not wait for others here, so that we do."""
    deadline = time.monotonic() + _LOCK_WAIT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.005)


def _postgres_engine(url: str) -> Engine:
    try:
        engine = create_engine(
            make_url(url).set(drivername="postgresql+psycopg"),
            pool_size=2,
            pool_pre_ping=True,
            connect_args={"connect_timeout": _CONNECT_WAIT_SECONDS},
            json_serializer=_dumps,
            json_deserializer=orjson.loads,
        )
    except ModuleNotFoundError as error:
        raise ConfigError("a Postgres ledger needs psycopg: pip install 'llm_guard_mw[postgres]'") from error

    def began(connection: Connection) -> None:
        if connection.get_execution_options().get("llm_guard_snapshot"):
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")

    event.listen(engine, "begin", began)
    return engine


def _dumps(value: object) -> str:
    return orjson.dumps(value).decode()


def chunks(values: Iterable[Any], size: int = 500) -> Iterator[list[Any]]:
    """The values in lists that fit one IN (…)."""
    chunk: list[Any] = []
    for value in values:
        chunk.append(value)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk

"""What Alembic runs: the migrations, inside the transaction that `ledger.database` has opened."""

from __future__ import annotations

from alembic import context

from llm_guard_mw.ledger.database import VERSION_TABLE
from llm_guard_mw.ledger.tables import METADATA

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=METADATA,
    version_table=VERSION_TABLE,
    # SQLite cannot alter most of a table: Alembic makes a new one and moves the rows.
    render_as_batch=connection.dialect.name == "sqlite",
)
with context.begin_transaction():
    context.run_migrations()

"""How answers are written: tables for people; JSON, JSON lines and CSV for programs, with nothing else beside.

Rule 1. With json, jsonl and csv standard output is pure data. Whatever else there is to say goes to standard error.
Rule 2. Numbers are exact: dollars are decimals, and are written as JSON numbers digit by digit.
Rule 3. What callers chose (names, tags) is shown in a table without its control characters.
"""

from __future__ import annotations

import csv
import io
import sys
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec
import typer

if TYPE_CHECKING:
    from rich.console import Console

#: One answer, or one of many: names to values that JSON can hold, or Decimals.
Record = Mapping[str, Any]

#: So many rows of an endless table somebody may read.
TABLE_MAX = 100

_BATCH = 500
_encode = msgspec.json.Encoder(decimal_format="number").encode


class Format(StrEnum):
    """What `--format` takes."""

    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"


def write_record(record: Record, form: Format, table: Callable[[], None], rows: str | None = None) -> None:
    """One answer as a whole. `rows` names the list in it that a CSV is made of."""
    if form is Format.TABLE:
        table()
    elif form is Format.JSON:
        _out(msgspec.json.format(_encode(record), indent=2) + b"\n")
    elif form is Format.JSONL:
        _out(_encode(record) + b"\n")
    else:
        found = [record] if rows is None else record[rows]
        columns = list(found[0]) if found else []
        _write_csv(found, columns)


def write_records(records: Iterable[Record], form: Format, columns: Sequence[str], *, shown: Sequence[str]) -> None:
    """Any number of answers. `columns` are those of a CSV, `shown` those of a table: its last TABLE_MAX rows."""
    if form is Format.TABLE:
        _write_last(records, shown)
    elif form is Format.JSON:
        _write_array(records)
    elif form is Format.JSONL:
        for batch in _batches(records):
            _out(b"".join([_encode(record) + b"\n" for record in batch]))
    else:
        _write_csv(records, columns)


def say(text: str) -> None:
    """Something for a person, beside the data."""
    typer.echo(text, err=True)


def _out(data: bytes) -> None:
    typer.echo(data, nl=False)


def _write_array(records: Iterable[Record]) -> None:
    separator = b"[\n"
    for batch in _batches(records):
        _out(separator + b",\n".join([_encode(record) for record in batch]))
        separator = b",\n"
    _out(b"[]\n" if separator == b"[\n" else b"\n]\n")


def _write_csv(records: Iterable[Record], columns: Sequence[str]) -> None:
    if not columns:
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for batch in _batches(records):
        writer.writerows([[_cell(record[name]) for name in columns] for record in batch])
        _out(text.getvalue().encode())
        text.seek(0)
        text.truncate()
    _out(text.getvalue().encode())


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, str | int) and not isinstance(value, bool)):
        return value
    return f"{value:f}" if isinstance(value, Decimal) else _encode(value).decode()


def _batches(records: Iterable[Record]) -> Iterable[list[Record]]:
    iterator = iter(records)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


# ---------------------------------------------------------------- tables


def console() -> Console:
    """Standard output for people: with colours and lines on a terminal, plain and as wide as it needs elsewhere."""
    from rich.console import Console

    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, color_system=None, width=10_000, legacy_windows=False)


def show_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Numbers stand right, what is not known is a dash."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    screen = console()
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD if screen.is_terminal else None, pad_edge=False
    )
    for index, name in enumerate(columns):
        numbers = all(row[index] is None or isinstance(row[index], int | Decimal) for row in rows)
        table.add_column(name, justify="right" if numbers and rows else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(shown(value)) for value in row))
    screen.print(table)


def shown(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Decimal):
        return dollars(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return " ".join(f"{visible(str(key))}={visible(str(item))}" for key, item in value.items()) or "–"
    return visible(str(value))


def dollars(value: Decimal) -> str:
    """Cents at least, and as many digits as say something: $0.05, $12.00, $0.000013."""
    if value == 0 or abs(value) >= 1:
        return f"${value:,.2f}"
    text = f"{value:.6f}" if abs(value) >= Decimal("0.0001") else f"{value:.9f}"
    whole, _, part = text.partition(".")
    return f"${whole}.{part.rstrip('0').ljust(2, '0')}"


def visible(text: str) -> str:
    """The text without what would steer a terminal."""
    if text.isprintable():
        return text
    return "".join("\ufffd" if unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp") else char for char in text)


def _write_last(records: Iterable[Record], columns: Sequence[str]) -> None:
    count = 0
    last: deque[Record] = deque(maxlen=TABLE_MAX)
    for record in records:
        last.append(record)
        count += 1
    show_table(columns, [[record[name] for name in columns] for record in last])
    if count > TABLE_MAX:
        say(f"The last {TABLE_MAX} of {count:,}; --format jsonl, json or csv give all.")

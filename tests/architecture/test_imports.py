"""Imports go down only: the floors of the design, read off the source; and what an import may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "llm_guard_mw"

#: On which floor a module lives: the longest name that it begins with counts.
FLOORS = {
    "model": 0,
    "errors": 0,
    "arithmetic": 1,
    "balances": 1,
    "bearer": 1,
    "degrade": 1,
    "directory": 1,
    "environ": 1,
    "estimate": 1,
    "http": 1,
    "identity": 1,
    "media": 1,
    "metering": 1,
    "notation": 1,
    "policy": 1,
    "pricing": 1,
    "rewriting": 1,
    "tokens": 1,
    "toml_lines": 1,
    "views": 1,
    "logs": 1,
    "call": 2,
    "allowance": 2,
    "reservation": 2,
    "settlement": 2,
    "stores.protocol": 2,
    "stores.journal": 2,
    "spool_records": 2,
    "alerts": 3,
    "alone": 3,
    "desk": 3,
    "duties": 3,
    "guard": 3,
    "keeper": 3,
    "ledger": 3,
    "local_cap": 3,
    "spool": 3,
    "stores": 3,
    "worker": 3,
    "config": 4,
    "config_file": 4,
    "passage": 4,
    "process": 4,
    "flask_context": 4,
    "asgi": 5,
    "capture": 5,
    "django": 5,
    "wsgi": 5,
    "cli": 6,
    "": 7,  # the package's own table of contents
}

#: Doors know nothing of each other.
DOORS = ("asgi", "capture", "django", "wsgi", "gateway")

#: Who may import what is heavy, or somebody else's to choose.
ONLY = {
    "sqlmodel": ("ledger",),
    "sqlalchemy": ("ledger",),
    "alembic": ("ledger",),
    "sqlite3": ("stores", "ledger"),  # the books on SQLite have pragmas of their own
    "httpx": (),  # a client brings its own: `capture` finds it in sys.modules
    "httpx2": ("bearer", "capture"),
    "aiohttp": ("capture",),
    "requests": (),
    "urllib.request": ("bearer",),
    "starlette": (),
    "django": ("django",),
    "asgiref": ("django",),
    "flask": ("flask_context",),
    "fastapi": ("cli",),
    "openai": ("cli",),
    "anthropic": ("cli",),
    "google": ("cli",),
    "tiktoken": ("tokens",),
    "genai_prices": ("pricing", "cli"),
    "jwt": ("bearer",),
    "pydantic": ("config_file",),
    "redis": ("stores",),
    "hiredis": ("stores",),
    "uvicorn": ("cli",),
    "typer": ("cli",),
}


def module_name(path: Path) -> str:
    """`stores.sqlite`, `capture`; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if "migrations" not in path.parts}


def floor(module: str) -> int:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in FLOORS:
            return FLOORS[name]
    raise AssertionError(f"{module} has no floor yet: add it to FLOORS, and to design.md's list")


@cache
def imports(path: Path) -> tuple[str, ...]:
    """The names that a module imports, at once or in a function; what is imported for its types alone is not."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path: Path) -> set[str]:
    """The modules of this package that a module imports."""
    found = set()
    for name in imports(path):
        if name.partition(".")[0] == "llm_guard_mw":
            inner = name.removeprefix("llm_guard_mw").strip(".")
            found.add(inner if inner in MODULES else inner.rpartition(".")[0])
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_go_down_only(module: str) -> None:
    upwards = {other for other in ours(MODULES[module]) if other and floor(other) > floor(module)}

    assert not upwards, f"{module} (floor {floor(module)}) imports from above"


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_only_the_command_line_imports_the_table_of_contents(module: str) -> None:
    assert floor(module) >= 6 or "" not in ours(MODULES[module])


@pytest.mark.parametrize("module", [name for name in MODULES if name.partition(".")[0] in DOORS])
def test_doors_do_not_import_each_other(module: str) -> None:
    door = module.partition(".")[0]

    assert not [
        other for other in ours(MODULES[module]) if other.partition(".")[0] in DOORS and other.partition(".")[0] != door
    ]


@pytest.mark.parametrize("library", list(ONLY))
def test_what_is_heavy_or_foreign_is_imported_in_one_place(library: str) -> None:
    guests = {
        module
        for module, path in MODULES.items()
        for name in imports(path)
        if (name == library or name.startswith(f"{library}.")) and module.partition(".")[0] not in ONLY[library]
    }

    assert not guests


def modules_after(statement: str) -> set[str]:
    script = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = modules_after("import llm_guard_mw")

    assert not loaded & {"sqlmodel", "sqlalchemy", "tiktoken", "genai_prices", "httpx2", "pydantic", "starlette", "jwt"}


def test_a_script_that_captures_loads_no_web_framework_and_no_database() -> None:
    loaded = modules_after("from llm_guard_mw import capture, current_call")

    assert not loaded & {"sqlmodel", "sqlalchemy", "tiktoken", "httpx2", "aiohttp", "starlette", "fastapi"}


@pytest.mark.parametrize("door", ["GuardMiddleware", "WSGIGuardMiddleware"])
def test_the_door_loads_no_database(door: str) -> None:
    loaded = modules_after(f"from llm_guard_mw import {door}")

    assert not loaded & {"sqlmodel", "sqlalchemy", "alembic", "starlette", "fastapi", "flask", "typer"}


@pytest.mark.parametrize(
    "statements",
    [
        "from llm_guard_mw.capture import capture as first\nfrom llm_guard_mw import capture",
        "import llm_guard_mw.capture\nfrom llm_guard_mw import capture",
        "from llm_guard_mw import capture\nimport llm_guard_mw.capture.httpx\nfrom llm_guard_mw import capture",
    ],
)
def test_capture_can_be_called_however_it_was_imported(statements: str) -> None:
    modules_after(f"{statements}\nassert callable(capture), capture")

"""The two faces of the guard and of the store differ in `await` alone: the sources are compared with it taken out."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap

import pytest

from llm_guard_mw.guard import AsyncGuard, Guard
from llm_guard_mw.stores.redis import AsyncRedisStore, RedisStore
from llm_guard_mw.stores.sqlite import AsyncSQLiteStore, SQLiteStore

#: What the async face calls by a name of its own.
NAMES = {"async_store": "store", "aidentify": "identify", "asettle_late": "settle_late", "arun": "run"}


def methods(kind: type) -> dict[str, str]:
    """The source of each method, formatting and waiting taken out."""
    [body] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    functions = [node for node in body.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {node.name: _without_waiting(ast.unparse(node)) for node in functions}


def _without_waiting(source: str) -> str:
    source = re.sub(r"\b(await|async) ", "", source)
    source = re.sub(r"\w+", lambda word: NAMES.get(word[0], word[0]), source)
    return ast.unparse(ast.parse(source))


def test_both_faces_of_the_guard_have_the_same_methods() -> None:
    assert list(methods(AsyncGuard)) == list(methods(Guard))


@pytest.mark.parametrize("name", list(methods(Guard)))
def test_the_faces_of_the_guard_differ_in_await_alone(name: str) -> None:
    assert methods(AsyncGuard)[name] == methods(Guard)[name]


@pytest.mark.parametrize("twins", [(SQLiteStore, AsyncSQLiteStore), (RedisStore, AsyncRedisStore)])
def test_the_faces_of_a_store_differ_in_await_alone(twins: tuple[type, type]) -> None:
    sync, asynchronous = map(methods, twins)

    shared = asynchronous.keys() - {"__init__"}

    assert {name: asynchronous[name] for name in shared} == {name: sync[name] for name in shared}


def test_the_async_store_has_what_a_request_needs() -> None:
    asked_for = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(AsyncGuard)))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == "store"
    }

    assert asked_for <= set(methods(AsyncSQLiteStore))
    assert asked_for <= set(methods(AsyncRedisStore))

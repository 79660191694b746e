"""Every key of a TOML file is found on the line where it stands."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_guard_mw.toml_lines import Path, TomlLines

FILE = '''\
# a comment with [brackets] = "and quotes
top = 1
"quoted key" = "a # no comment"   # a comment
'its' . x = 2
dotted.deeper.key = "x"
text = """
[not.a.table]
no = "key"
three quotes: \\""" and the end:""""
raw = \'\'\'
[[nor.this]]\'\'\'
when = 1979-05-27 07:32:00
many = [
    "one",  # comment, with a comma ]
    # a line of comment

    { limit = "two", when = { tier = "free" } },
    ["three", [
        "deep" ]],
]
flat = ["a", "b"]
empty = []
[table]
key = { a = 1, b = [1,
  2] }
[table.sub."dotted.name"]
z = true
[[routes]]
path = "/a"
[routes.cache]
ttl = 1
[[routes]]
path = "/b"
[[routes.inner]]
x = 1
[[routes.inner]]
x = 2
[ spaced . out ]
k = 1
[later]
[later.again]
v = 1
'''


@pytest.mark.parametrize(
    ("path", "mark"),
    [
        (("top",), "top = 1"),
        (("quoted key",), '"quoted key"'),
        (("its", "x"), "'its' . x"),
        (("dotted",), "dotted.deeper"),
        (("dotted", "deeper", "key"), "dotted.deeper"),
        (("text",), 'text = """'),
        (("raw",), "raw = "),
        (("when",), "when = 1979"),
        (("many",), "many = ["),
        (("many", 0), '"one"'),
        (("many", 1), '{ limit = "two"'),
        (("many", 1, "when", "tier"), '{ limit = "two"'),
        (("many", 2), '["three"'),
        (("many", 2, 1, 0), '"deep"'),
        (("flat", 1), "flat = "),
        (("empty",), "empty = []"),
        (("table",), "[table]"),
        (("table", "key", "a"), "key = { a"),
        (("table", "key", "b", 1), "  2] }"),
        (("table", "sub", "dotted.name"), '[table.sub."dotted.name"]'),
        (("table", "sub", "dotted.name", "z"), "z = true"),
        (("routes", 0, "path"), 'path = "/a"'),
        (("routes", 0, "cache"), "[routes.cache]"),
        (("routes", 0, "cache", "ttl"), "ttl = 1"),
        (("routes", 1, "path"), 'path = "/b"'),
        (("routes", 1, "inner", 0, "x"), "x = 1"),
        (("routes", 1, "inner", 1, "x"), "x = 2"),
        (("spaced", "out", "k"), "k = 1"),
        (("later", "again", "v"), "v = 1"),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_key_is_found_on_its_line(path: Path, mark: str, newline: str) -> None:
    lines = FILE.split("\n")
    tomllib.loads(FILE.replace("\n", newline))

    line = TomlLines(FILE.replace("\n", newline)).line(path)

    assert line in [number for number, text in enumerate(lines, 1) if text.strip().startswith(mark.strip())]


def test_what_is_missing_stands_where_its_surroundings_do() -> None:
    lines = TomlLines('store = "x"\n\n[[routes]]\nname = "a"\n')

    assert lines.line(("routes", 0, "path")) == 3
    assert lines.line(("nowhere",)) == 1


_NAMES = st.text(alphabet='ab-_ ."#=[]é\\\n', min_size=0, max_size=5)
_SCALARS = st.one_of(st.integers(-9, 9), st.booleans(), st.text(alphabet="a \"'#,[]{}=\\\n", max_size=6), st.just(1.5))
_VALUES: st.SearchStrategy[Any] = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=6,
)


def _written(value: Any, draw: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)} = {_written(item, draw)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        between = draw(st.sampled_from([" ", "\n", " # x, ]\n\t"]))
        return "[" + between + "".join(f"{_written(item, draw)}{between},{between}" for item in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return _text(value) if isinstance(value, str) else str(value)


def _text(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _paths(value: Any, path: Path = ()) -> list[Path]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *[found for key, item in items for found in _paths(item, (*path, key))]]


@given(
    tables=st.lists(st.tuples(st.booleans(), st.dictionaries(_NAMES, _VALUES, max_size=3)), max_size=4), data=st.data()
)
def test_every_key_of_any_file_gets_a_line_and_no_other(
    tables: list[tuple[bool, dict[str, Any]]], data: st.DataObject
) -> None:
    text = ""
    for number, (of_array, table) in enumerate(tables):
        text += "[[routes]]\n" if of_array else f"[t{number}]\n"
        for key, value in table.items():
            text += f"{_text(key)} = {_written(value, data.draw)} # end\n"

    lines = TomlLines(text).lines

    assert set(lines) == set(_paths(tomllib.loads(text)))

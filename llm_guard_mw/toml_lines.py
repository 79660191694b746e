"""Where each key of a TOML file stands: the line numbers that `tomllib` does not give.

The text has been parsed by `tomllib` before, so it is known to be well-formed. This reader only has to find its
way: it skips over values without understanding them.

Paths are tuples of keys and array positions: `("routes", 0, "limits", 1)`.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from collections.abc import Mapping

Path = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
#: A basic or literal string, of one line or of several. The long ones may end in up to two quotes of their own.
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"""(?:"{0,2})'
    r"|'''.*?'''(?:'{0,2})"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}\n#]+")


class TomlLines:
    """The lines of a TOML text's keys, tables and array items.

    TomlLines('[a]\\nb = [1,\\n2]').line(("a", "b", 1))    # 3
    """

    def __init__(self, text: str) -> None:
        self._text = text.replace("\r\n", "\n")
        self._starts = [0, *[match.end() for match in re.finditer("\n", self._text)]]
        self._lines: dict[Path, int] = {(): 1}
        self._tables: dict[Path, int] = {}  # how many [[tables]] of a name there are
        self._at = 0
        self._read()

    def line(self, path: Path) -> int:
        """The line of `path`, or of the nearest thing around it that stands in the file."""
        while path not in self._lines:
            path = path[:-1]
        return self._lines[path]

    @property
    def lines(self) -> Mapping[Path, int]:
        return self._lines

    # ------------------------------------------------------------ reading

    def _read(self) -> None:
        table: Path = ()
        self._skip(_BLANK)
        while self._at < len(self._text):
            if self._text[self._at] == "[":
                table = self._header()
            else:
                self._pair(table)
            self._skip(_BLANK)

    def _header(self) -> Path:
        begin = self._at
        of_array = self._text.startswith("[[", begin)
        self._at += 2 if of_array else 1
        names = self._key()
        self._skip(_SPACE)
        self._at += 2 if of_array else 1
        path = (*self._resolved(names[:-1], begin), names[-1])
        if of_array:
            number = self._tables.get(path, 0)
            self._tables[path] = number + 1
            self._mark(path, begin)
            path += (number,)
        self._mark(path, begin)
        return path

    def _resolved(self, names: list[str], begin: int) -> Path:
        """A header's path, where the name of an array of tables stands for its last table so far."""
        path: Path = ()
        for name in names:
            path += (name,)
            self._mark(path, begin)
            if path in self._tables:
                path += (self._tables[path] - 1,)
        return path

    def _pair(self, table: Path) -> None:
        begin = self._at
        path = table
        for name in self._key():
            path += (name,)
            self._mark(path, begin)
        self._skip(_SPACE)
        self._at += 1  # the equals sign
        self._skip(_SPACE)
        self._value(path)

    def _key(self) -> list[str]:
        names = []
        while True:
            self._skip(_SPACE)
            if (quoted := _STRING.match(self._text, self._at)) is not None:
                names.append(_unquoted(quoted[0]))
                self._at = quoted.end()
            else:
                names.append(self._skip(_BARE_KEY))
            self._skip(_SPACE)
            if not self._text.startswith(".", self._at):
                return names
            self._at += 1

    def _value(self, path: Path) -> None:
        opening = self._text[self._at]
        if opening == "[":
            self._array(path)
        elif opening == "{":
            self._inline_table(path)
        elif opening in "\"'":
            self._skip(_STRING)
        else:
            self._skip(_SCALAR)

    def _array(self, path: Path) -> None:
        self._at += 1
        number = 0
        while True:
            self._skip(_BLANK)
            if self._text[self._at] == "]":
                self._at += 1
                return
            if self._text[self._at] == ",":
                self._at += 1
                continue
            item: Path = (*path, number)
            self._mark(item, self._at)
            self._value(item)
            number += 1

    def _inline_table(self, path: Path) -> None:
        self._at += 1
        while True:
            self._skip(_BLANK)
            if self._text[self._at] == "}":
                self._at += 1
                return
            if self._text[self._at] == ",":
                self._at += 1
                continue
            self._pair(path)

    # ------------------------------------------------------------ places

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        if match is None or (match.end() == self._at and pattern not in (_BLANK, _SPACE)):
            raise ValueError(f"line {self._line_at(self._at)}: this is no TOML")
        self._at = match.end()
        return match[0]

    def _mark(self, path: Path, at: int) -> None:
        self._lines.setdefault(path, self._line_at(at))

    def _line_at(self, at: int) -> int:
        return bisect_right(self._starts, at)


def _unquoted(key: str) -> str:
    (name,) = tomllib.loads(f"{key} = 0")  # it knows the escapes
    return str(name)

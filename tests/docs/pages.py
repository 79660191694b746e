"""The pages of the documentation, and the snippets in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Snippet:
    page: Path
    line: int
    language: str
    code: str
    before: str  # the prose between the snippet before it and this one

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> str | None:
        """The file that the snippet is, if its first line says so."""
        found = re.match(r"# ([\w/]+\.(?:py|toml))\b", self.code)
        return found[1] if found else None

    @property
    def commands(self) -> list[str]:
        """The lines of a shell snippet, those that go on put together."""
        return [line.strip() for line in self.code.replace("\\\n", " ").splitlines() if line.strip()]


def pages() -> list[Path]:
    folders = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md")]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(folders)]


@cache
def snippets(page: Path) -> tuple[Snippet, ...]:
    text = page.read_text(encoding="utf-8")
    found, end = [], 0
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Snippet(page, line, match[1], match[2], text[end : match.start()]))
        end = match.end()
    return tuple(found)


def all_snippets(*languages: str) -> list[Snippet]:
    return [snippet for page in pages() for snippet in snippets(page) if snippet.language in languages]

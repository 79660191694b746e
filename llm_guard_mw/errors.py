"""Everything that this package raises, and whose fault it is.

GuardError
├── LimitExceeded       the caller's budget: carries the Refusal that the doors would send
├── IdentityError       the caller's credential: missing where one is needed, or not valid
├── ConfigError         the operator's file: every mistake found, with file, line, value and fix
├── StoreUnavailable    the machinery's: the store did not answer, or is full
└── LedgerUnavailable   the machinery's: the database of the books did not answer
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_guard_mw.model import Refusal


class GuardError(Exception):
    """The root of all errors of this package."""


class LimitExceeded(GuardError):
    """A limit refused the work. `.refusal` says which one, how much is left, and when it resets."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class IdentityError(GuardError):
    """A credential is there but not valid, or none is there and the rules demand one.

    The message names the source (`jwt:sub`, `header:x-user-id`), never the credential. `retry_after_seconds` is
    None where the credential is at fault (401); it is set while that cannot be told yet, because the keys to
    judge by are still on their way (503). Nobody is let in either way.
    """

    def __init__(self, message: str, *, retry_after_seconds: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing wrong in a configuration: where it stands, what stands there, what would be right."""

    where: str  # "llm_guard.toml:14 routes[0].limits[1]", or the environment variable's name
    problem: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem} ({self.fix})" if self.fix else f"{self.where}: {self.problem}"


class ConfigError(GuardError):
    """The configuration cannot be used. `.mistakes` lists all that is wrong with it, not just the first."""

    def __init__(self, mistakes: Iterable[Mistake] | str) -> None:
        if isinstance(mistakes, str):
            mistakes = [Mistake("configuration", mistakes, "")]
        self.mistakes = tuple(mistakes)
        super().__init__("\n".join(str(mistake) for mistake in self.mistakes))


class StoreUnavailable(GuardError):
    """The store did not answer in time, refused the work, or has no room left in its journal.

    `retry_after_seconds` is what a 503 should say. `asked` says that the words may have reached the store, which
    may have done what they say.
    """

    def __init__(self, message: str, *, retry_after_seconds: int = 1, asked: bool = False) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
        self.asked = asked


class LedgerUnavailable(GuardError):
    """The database of the books did not answer, or another process held it too long. Nothing was lost.

    What it was to take down waits in the journal, and is taken down by a later drain.
    """

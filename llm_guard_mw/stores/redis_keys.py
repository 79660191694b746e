"""The names of the keys in Redis, and what stands under them: docs/reference/redis-keys.md.

Every name carries the hash tag of its partition, `{p00}`, so that a script's keys lie in one slot of a cluster. A
single server has one partition.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from llm_guard_mw.model import Kind

#: Raised by one for each change of what is kept; an unknown (newer) one is refused.
SCHEMA_VERSION = 1
#: One server, one partition: the journal is one stream, and one script covers every limit.
PARTITIONS = 1


@dataclass(frozen=True, slots=True)
class Keys:
    """The names of one partition. `prefix` keeps several guards apart that share a database."""

    prefix: str
    partition: int = 0
    base: str = field(init=False)
    meta: str = field(init=False)
    due: str = field(init=False)
    journal: str = field(init=False)
    worker: str = field(init=False)
    subjects: str = field(init=False)
    places: str = field(init=False)
    replayed: str = field(init=False)

    def __post_init__(self) -> None:
        base = f"{self.prefix}:{{p{self.partition:02d}}}:"
        object.__setattr__(self, "base", base)
        for name in ("meta", "due", "journal", "worker", "subjects", "places", "replayed"):
            object.__setattr__(self, name, base + name)

    def exchange(self, exchange: str) -> str:
        """A hold while it is open, then its ending."""
        return f"{self.base}x:{exchange}"

    def refusal(self, entry_id: str) -> str:
        """That a refusal has been entered."""
        return f"{self.base}r:{entry_id}"

    def call(self, call: str) -> str:
        """The concurrency balances that a call has a place in."""
        return f"{self.base}c:{call}"

    def members(self, balance: str) -> str:
        """The calls that have a place in a concurrency balance."""
        return f"{self.base}m:{balance}"

    def values(self, parent: str, scope: str) -> str:
        """The values of a scope that have balances of their own."""
        return f"{self.base}v:{parent}|{scope}"

    def subject(self, subject: str) -> str:
        """The balances of a subject."""
        return f"{self.base}b:{subject}"

    def place_of(self, balance: str, kind: Kind) -> tuple[str, str]:
        """The key under which a balance is kept, and its field there."""
        return _place_of(self.base, balance, kind is Kind.CONCURRENT)

    def balance_name(self, key: str, field: str) -> str:
        """The name of a balance, from where it is kept."""
        subject = key.removeprefix(f"{self.base}b:")
        return f"{subject}|{field}" if field else subject


@lru_cache(maxsize=16_384)
def _place_of(base: str, balance: str, concurrent: bool) -> tuple[str, str]:
    if concurrent:
        return f"{base}m:{balance}", ""
    subject, _, counted = balance.partition("|")
    return f"{base}b:{subject}", counted

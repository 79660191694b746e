"""Which stored responses a process has metered already, so that fetching one again is not metered twice.

A stored response repeats its usage each time it is fetched. It is known by its provider and its id; where either side
does not know the provider, by the id alone, which is unique in itself.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final

_KNOWN_MAX: Final = 16_384


class BilledResponses:
    """Remembers the latest responses; it may be used from any thread."""

    def __init__(self, known_max: int = _KNOWN_MAX) -> None:
        self._known_max = known_max
        self._known: OrderedDict[str, str | None] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, provider: str | None, response_id: str) -> bool:
        """Remember a response; False if it was known already."""
        with self._lock:
            known = self._holds(provider, response_id)
            self._known[response_id] = provider or self._known.get(response_id)
            self._known.move_to_end(response_id)
            while len(self._known) > self._known_max:
                self._known.popitem(last=False)
            return not known

    def holds(self, provider: str | None, response_id: str) -> bool:
        """Whether this response was noted."""
        with self._lock:
            return self._holds(provider, response_id)

    def _holds(self, provider: str | None, response_id: str) -> bool:
        if response_id not in self._known:
            return False
        noted = self._known[response_id]
        return noted is None or provider is None or noted == provider

"""What a meter keeps of an answer's bytes: the first megabyte, and of what follows the last bit."""

from __future__ import annotations

from typing import Final

HEAD_BYTES: Final = 1024 * 1024
TAIL_BYTES: Final = 128 * 1024


class Kept:
    """The bytes are only copied here. A chunk costs its length, whatever its size, and memory is bounded."""

    __slots__ = ("_head", "_lost", "_room", "_tail")

    def __init__(self) -> None:
        self._head = bytearray()
        self._tail = bytearray()
        self._room = HEAD_BYTES
        self._lost = False

    def add(self, chunk: bytes) -> None:
        room = self._room = self._room - len(chunk)
        if room >= 0:
            self._head += chunk
        else:
            self._overflow(chunk)

    def _overflow(self, chunk: bytes) -> None:
        here = max(0, self._room + len(chunk))
        self._room = -1
        self._head += chunk[:here]
        self._tail += chunk[max(here, len(chunk) - TAIL_BYTES) :]
        self._lost = self._lost or len(chunk) - here > TAIL_BYTES
        if len(self._tail) > 2 * TAIL_BYTES:  # not at each chunk: moving the tail costs its length
            self._cut_tail()

    def _cut_tail(self) -> None:
        if len(self._tail) > TAIL_BYTES:
            del self._tail[:-TAIL_BYTES]
            self._lost = True

    def pieces(self) -> tuple[bytes, bytes | None]:
        """All bytes and None; or, where some were lost between them, the first and the last."""
        if not self._tail:
            return bytes(self._head), None
        self._cut_tail()
        if self._lost:
            return bytes(self._head), bytes(self._tail)
        return bytes(self._head + self._tail), None

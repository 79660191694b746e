"""Content codings undone on a copy: gzip and deflate always, br and zstd where a decoder is installed.

Rule 1. Pieces come out as the input goes in, each of bounded size, whatever the input claims.
Rule 2. What inflates more than a hundredfold is given up: no honest answer does, and the time spent must stay in
        proportion to the bytes that came.
Rule 3. A body that is not in the coding it names is taken as it is: some transports decode it and keep the header.
"""

from __future__ import annotations

import importlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

PIECE_BYTES = 64 * 1024
GROWTH_MAX = 100
GROWTH_FREE_BYTES = 1024 * 1024

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class Undecodable(ValueError):
    """The body cannot be read: an unknown coding, damaged bytes, or a bomb. The message says which."""


class _Coding(Protocol):
    def inflate(self, data: bytes) -> Iterator[bytes]: ...


class Decoder:
    """Undoes one content coding, chunk by chunk."""

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._start = b""
        self._coding: _Coding | None = None
        self._in_bytes = 0
        self._out_bytes = 0

    def decode(self, chunk: bytes) -> Iterator[bytes]:
        """The decoded pieces of this chunk. Raises Undecodable; what came out before stays good."""
        if not chunk:
            return
        self._in_bytes += len(chunk)
        if self._coding is None:
            chunk = self._start + chunk
            if len(chunk) < _START_BYTES:
                self._start = chunk
                return
            self._start = b""
            self._coding = _coding_of(self._encoding, chunk)
        yield from self._bounded(self._coding, chunk)

    def flush(self) -> Iterator[bytes]:
        """What was held back to tell the coding, of a body that is no longer than that."""
        if self._coding is None and self._start:
            self._coding = _coding_of(self._encoding, self._start)
            yield from self._bounded(self._coding, self._start)

    def _bounded(self, coding: _Coding, chunk: bytes) -> Iterator[bytes]:
        try:
            for piece in coding.inflate(chunk):
                self._out_bytes += len(piece)
                if self._out_bytes > GROWTH_FREE_BYTES + GROWTH_MAX * self._in_bytes:
                    raise Undecodable(f"{self._encoding}: inflates more than {GROWTH_MAX} times")
                yield piece
        except Undecodable:
            raise
        except Exception as error:  # each library has errors of its own, and not all are imported
            raise Undecodable(f"{self._encoding}: {type(error).__name__}") from error


def decoder_for(encoding: str | None) -> Decoder | None:
    """The decoder of a Content-Encoding header; None where there is nothing to undo. Raises Undecodable."""
    names = [name.strip().lower() for name in (encoding or "").split(",")]
    names = [name.removeprefix("x-") for name in names if name not in ("", "identity")]
    if not names:
        return None
    if len(names) > 1 or names[0] not in _CODINGS:
        raise Undecodable(f"{', '.join(names)[:64]}: not a coding that is read here")
    return Decoder(names[0])


def _coding_of(encoding: str, start: bytes) -> _Coding:
    return _CODINGS[encoding](start)


class _Identity:
    def inflate(self, data: bytes) -> Iterator[bytes]:
        yield data


class _Zlib:
    """Gzip (of any number of members), and deflate with and without its wrapper."""

    def __init__(self, wbits: int) -> None:
        self._wbits = wbits
        self._stream = zlib.decompressobj(wbits)
        self._members = 0

    def inflate(self, data: bytes) -> Iterator[bytes]:
        while True:
            if self._stream.eof:
                if not data.startswith(GZIP_MAGIC[:1]):
                    return  # padding behind the last member
                self._stream = zlib.decompressobj(self._wbits)
            piece = self._stream.decompress(data, PIECE_BYTES)
            data = self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail
            if piece:
                yield piece
            if not data and not piece:
                return


def _gzip(start: bytes) -> _Coding:
    return _Zlib(16 + zlib.MAX_WBITS) if start.startswith(GZIP_MAGIC) else _Identity()


#: Deflate and br have no signature, but they hardly ever begin with so much text.
_START_BYTES = 16
_PLAIN_START = re.compile(rb"[\t\n\r -~]{1,16}")


def _is_plain(start: bytes) -> bool:
    match = _PLAIN_START.match(start)
    return match is not None and match.end() == min(len(start), _START_BYTES)


def _deflate(start: bytes) -> _Coding:
    if _is_plain(start):
        return _Identity()
    wrapped = start[0] & 0x0F == 8 and int.from_bytes(start[:2], "big") % 31 == 0
    return _Zlib(zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS)


class _Brotli:
    def __init__(self, stream: Any) -> None:  # Any: one of two modules, neither typed
        self._stream = stream

    def inflate(self, data: bytes) -> Iterator[bytes]:
        piece = self._stream.process(data, output_buffer_limit=PIECE_BYTES)
        while piece:  # it may hold more back even when it says that it accepts more
            yield piece
            piece = self._stream.process(b"", output_buffer_limit=PIECE_BYTES)


def _br(start: bytes) -> _Coding:
    if _is_plain(start):
        return _Identity()
    for name in ("brotli", "brotlicffi"):
        module = _installed(name)
        if module is None:
            continue
        stream = module.Decompressor()
        # Without a limit on its output, a few bytes make it fill the memory: versions before 1.2.
        if hasattr(stream, "can_accept_more_data"):
            return _Brotli(stream)
    raise Undecodable("br: no decoder is installed (brotli 1.2 or newer)")


class _BoundedZstd:
    """The interface of `compression.zstd` and its backport: like zlib's, with a limit on the output."""

    def __init__(self, new_stream: Callable[[], Any]) -> None:  # Any: a class of either module
        self._new_stream = new_stream
        self._stream = new_stream()

    def inflate(self, data: bytes) -> Iterator[bytes]:
        while True:
            if self._stream.eof:
                if not data.startswith(ZSTD_MAGIC[:1]):
                    return
                self._stream = self._new_stream()
            piece = self._stream.decompress(data, PIECE_BYTES)
            data = self._stream.unused_data if self._stream.eof else b""
            if piece:
                yield piece
            if not data and (self._stream.eof or self._stream.needs_input):
                return


class _SlicedZstd:
    """`zstandard` has no limit on the output: small slices bound what one step can grow to (128 kB a block)."""

    _SLICE_BYTES = 256

    def __init__(self, stream: Any) -> None:  # Any: the module is not a dependency
        self._stream = stream

    def inflate(self, data: bytes) -> Iterator[bytes]:
        for at in range(0, len(data), self._SLICE_BYTES):
            yield self._stream.decompress(data[at : at + self._SLICE_BYTES])


def _zstd(start: bytes) -> _Coding:
    if not start.startswith(ZSTD_MAGIC):
        return _Identity()
    for name in ("compression.zstd", "backports.zstd"):
        if module := _installed(name):
            return _BoundedZstd(module.ZstdDecompressor)
    if module := _installed("zstandard"):
        return _SlicedZstd(module.ZstdDecompressor(max_window_size=8 * 1024 * 1024).decompressobj())
    raise Undecodable("zstd: no decoder is installed (backports.zstd or zstandard)")


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


_CODINGS: dict[str, Callable[[bytes], _Coding]] = {"gzip": _gzip, "deflate": _deflate, "br": _br, "zstd": _zstd}

"""What a WSGI environ says of a request; Django's `request.META` has the same keys, whatever server it runs on."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from functools import lru_cache
from typing import Any

from llm_guard_mw.http import Headers


def headers_of(environ: Mapping[str, Any], identity_headers: frozenset[bytes]) -> Headers:
    """The headers as they came, as far as that can be told: a server joins those of one name with commas.

    Two that name a caller differently must not pass for one long name. The core refuses them, so they are told apart.
    """
    found: list[tuple[bytes, bytes]] = []
    for key, text in environ.items():
        name = _header_name(key)
        if name is None or not text:
            continue
        value = native_bytes(text)
        if name in identity_headers and b"," in value:
            found.extend((name, part.strip()) for part in value.split(b","))
        else:
            found.append((name, value))
    return tuple(found)


@lru_cache(maxsize=1024)
def _header_name(key: str) -> bytes | None:
    """The header behind a key of the environ. `Content_Length` is none: the length itself has a key of its own."""
    if key in ("CONTENT_TYPE", "CONTENT_LENGTH"):
        return key.lower().replace("_", "-").encode()
    if not key.startswith("HTTP_") or key in ("HTTP_CONTENT_TYPE", "HTTP_CONTENT_LENGTH"):
        return None
    return native_bytes(key[5:].lower().replace("_", "-"))


def take_out(environ: MutableMapping[str, Any], names: frozenset[bytes]) -> None:
    """Take out headers that the app must not believe."""
    for name in names:
        environ.pop("HTTP_" + name.decode("latin-1").replace("-", "_").upper(), None)


def peer_of(environ: Mapping[str, Any]) -> tuple[str, int] | None:
    """The other end of the connection: None for a Unix socket, which gunicorn calls "" and waitress "localhost".

    Where Werkzeug's ProxyFix stands in front of us it has kept the address that the server gave.
    """
    host = environ.get("werkzeug.proxy_fix.orig", environ).get("REMOTE_ADDR")
    port = environ.get("REMOTE_PORT")
    if host == "" or (host == "localhost" and port == "None"):
        return None
    number = whole_number(str(port))
    return host or "unknown", -1 if number is None else number


def native_bytes(text: str) -> bytes:
    """The bytes that a native string stands for."""
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:  # no server should; but two names must not become one
        return text.encode("utf-8", "surrogatepass")


def whole_number(text: str | None) -> int | None:
    """A whole number as HTTP writes it; None for anything else."""
    return int(text) if text and text.isascii() and text.isdigit() else None

"""Where a Redis is, who we are there, and how long we wait: read off the store's URL."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from llm_guard_mw.errors import ConfigError

if TYPE_CHECKING:
    import ssl

TIMEOUT_SECONDS: Final = 0.25
CONNECTIONS: Final = 32

SCHEMES: Final = ("redis", "rediss", "redis+sentinel", "rediss+sentinel")
_PORTS: Final = {"redis": 6379, "rediss": 6379, "redis+sentinel": 26379, "rediss+sentinel": 26379}
_OPTIONS: Final = (
    "timeout",
    "max_connections",
    "prefix",
    "sentinel_username",
    "sentinel_password",
    "ssl_ca_certs",
    "ssl_certfile",
    "ssl_keyfile",
    "ssl_cert_reqs",
)


@dataclass(frozen=True, slots=True)
class Address:
    """A store URL, read: `redis://user:password@host:port/db`, `rediss://…`, `redis+sentinel://h:p,h:p/service/db`."""

    hosts: tuple[tuple[str, int], ...]
    service: str | None = None
    username: str | None = None
    password: str | None = None
    db: int = 0
    tls: Mapping[str, str] | None = None
    timeout: float = TIMEOUT_SECONDS
    connections: int = CONNECTIONS
    prefix: str | None = None
    sentinel_username: str | None = None
    sentinel_password: str | None = None

    @property
    def name(self) -> str:
        """For messages: without credentials."""
        hosts = ",".join(f"{host}:{port}" for host, port in self.hosts)
        return f"{hosts}/{self.service}/{self.db}" if self.service else f"{hosts}/{self.db}"

    def tls_context(self) -> ssl.SSLContext | None:
        if self.tls is None:
            return None
        import ssl  # costs a few milliseconds, and few need it

        context = ssl.create_default_context(cafile=self.tls.get("ssl_ca_certs"))
        if self.tls.get("ssl_cert_reqs") == "none":
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if "ssl_certfile" in self.tls:
            context.load_cert_chain(self.tls["ssl_certfile"], self.tls.get("ssl_keyfile"))
        return context


def read_url(url: str) -> Address:
    """The address that a URL names. ConfigError says which piece is wrong, and shows none: each may be
    part of a password that was not encoded.
    """
    parts = urlsplit(url)
    scheme = parts.scheme
    if scheme not in SCHEMES:
        raise ConfigError(f"store: the scheme is none of {', '.join(SCHEMES)}")
    credentials, _, hosts = parts.netloc.rpartition("@")
    username, colon, password = credentials.partition(":")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(options.keys() - set(_OPTIONS))
    if unknown:
        raise ConfigError(f"store: the URL has an option that is none of {', '.join(_OPTIONS)}")
    path = [unquote(part) for part in parts.path.split("/") if part]
    service = None
    if scheme.endswith("+sentinel"):
        if not path:
            raise ConfigError(f"store: name the service: {scheme}://host:port,host:port/SERVICE")
        service = path.pop(0)
    tls = {key: value for key, value in options.items() if key.startswith("ssl_")}
    if tls and not scheme.startswith("rediss"):
        raise ConfigError("store: ssl_ options need TLS: write rediss:// for redis://")
    if tls.get("ssl_cert_reqs", "required") not in ("required", "none"):
        raise ConfigError("store: ssl_cert_reqs is neither required nor none")
    if not re.fullmatch(r"[A-Za-z0-9_.:-]+", options.get("prefix", "llm_guard")):
        raise ConfigError("store: the prefix may have letters, digits and _ . : - in it")
    return Address(
        hosts=tuple(_host(each, _PORTS[scheme]) for each in (hosts or "localhost").split(",")),
        service=service,
        username=unquote(username) or None,
        password=unquote(password) if colon else None,
        db=_number("database", path[0]) if path else 0,
        tls=tls if scheme.startswith("rediss") else None,
        timeout=_seconds(options.get("timeout", str(TIMEOUT_SECONDS))),
        connections=_number("max_connections", options.get("max_connections", str(CONNECTIONS))),
        prefix=options.get("prefix"),
        sentinel_username=options.get("sentinel_username"),
        sentinel_password=options.get("sentinel_password"),
    )


def _host(text: str, port: int) -> tuple[str, int]:
    if text.startswith("["):  # an IPv6 address
        host, _, rest = text[1:].partition("]")
        return host, _number("port", rest[1:]) if rest else port
    host, colon, number = text.partition(":")
    return host or "localhost", _number("port", number) if colon else port


def _number(what: str, text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ConfigError(
            f"store: the {what} in the URL is not a number (in a password, write / @ : ? # as %2F %40 %3A %3F %23)"
        )
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 60:
        raise ConfigError(f"store: timeout is not between 0 and 60 seconds; the default is {TIMEOUT_SECONDS}")
    return seconds

"""How Redis is reached: one connection policy for both faces.

Rule 1. RESP2, no retry inside a client, short timeouts. redis-py's own default is ten retries after the bytes have
        left, which would debit twice; here one retry is made by those who know that their words may be said twice.
Rule 2. A connection that was lost, or that answers for a server which cannot serve (a replica, one that still
        loads), is never used again; with Sentinel the next one asks for the master anew.
Rule 3. Errors are redis-py's inside `stores`, and StoreUnavailable outside.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, cast

import hiredis
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from llm_guard_mw.errors import ConfigError, StoreUnavailable
from llm_guard_mw.stores.redis_address import Address
from llm_guard_mw.stores.redis_scripts import SCRIPTS
from llm_guard_mw.stores.redis_steps import Command, Spoken

#: How often Redis is looked for while it cannot be reached.
REST_SECONDS: Final = 0.5
CLIENT_NAME: Final = "llm_guard"

# ---------------------------------------------------------------- what may go wrong

#: What a server says that cannot serve now, though it answers. Nothing was done.
_AWAY: Final = (redis.exceptions.ReadOnlyError, redis.exceptions.MasterDownError, redis.exceptions.ConnectionError)
#: The link is lost, or was never there.
LINK_ERRORS: Final = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError, *_AWAY)

_REPLY_ERRORS: Final[Mapping[str, type[redis.RedisError]]] = {
    "NOSCRIPT": redis.exceptions.NoScriptError,
    "READONLY": redis.exceptions.ReadOnlyError,
    "MASTERDOWN": redis.exceptions.MasterDownError,
    "LOADING": redis.exceptions.BusyLoadingError,
    "NOAUTH": redis.exceptions.AuthenticationError,
    "WRONGPASS": redis.exceptions.AuthenticationError,
    "NOPERM": redis.exceptions.NoPermissionError,
}


def _reply_error(message: str) -> redis.RedisError:
    """An error reply as redis-py's sync client would have it."""
    return _REPLY_ERRORS.get(message.partition(" ")[0], redis.exceptions.ResponseError)(message)


def flawed(replies: Sequence[Any]) -> bool:
    """Whether an error is among them."""
    for reply in replies:  # noqa: SIM110 - `any` with a generator takes three times as long for one reply
        if isinstance(reply, Exception):
            return True
    return False


def raise_if_away(replies: Sequence[Any]) -> None:
    """A replica or a loading server is as good as a lost link."""
    for reply in replies:
        if isinstance(reply, _AWAY):
            raise reply


def to_load(commands: Sequence[Command], replies: Sequence[Any]) -> list[int]:
    """Which of the commands were not run, since the server does not know their script (any more)."""
    return [n for n, reply in enumerate(replies) if isinstance(reply, redis.exceptions.NoScriptError)]


def loading(commands: Sequence[Command], missing: Sequence[int]) -> list[Command]:
    """What loads their scripts, and says them again."""
    shas = {str(commands[n][1]) for n in missing}
    return [("SCRIPT", "LOAD", SCRIPTS[sha].text) for sha in shas] + [commands[n] for n in missing]


class Breaker:
    """Remembers that Redis is away, so that no caller waits to find out: a thread of its own looks again meanwhile."""

    def __init__(self, name: str, look: Callable[[], None]) -> None:
        self.name = name
        self.error: Exception | None = None
        self._look = look  # raises while Redis is away
        self._lock = threading.Lock()
        self._ended: threading.Event | None = None  # of the thread that looks, while there is one

    def check(self) -> None:
        """Raise at once while Redis is away."""
        if self.error is not None:
            raise unavailable(self.name, self.error)

    def failed(self, error: Exception) -> None:
        with self._lock:
            self.error = error
            if self._ended is None:
                self._ended = threading.Event()
                threading.Thread(
                    target=self._look_again, args=(self._ended,), name="llm-guard-breaker", daemon=True
                ).start()

    def worked(self) -> None:
        self.error = None

    def close(self) -> None:
        """Look no more; and whoever comes next may find out for himself."""
        with self._lock:
            if self._ended is not None:
                self._ended.set()
            self._ended = self.error = None

    def _look_again(self, ended: threading.Event) -> None:
        while not ended.wait(REST_SECONDS):
            try:
                if self.error is not None:
                    self._look()
            except Exception as error:
                with self._lock:
                    if self._ended is ended and self.error is not None:
                        self.error = error
                continue
            with self._lock:
                if self._ended is ended:
                    self._ended = self.error = None
            return


def unavailable(name: str, error: Exception, *, asked: bool = False) -> Exception:
    """What the callers of a store are told: each gets an error of its own, or tracebacks would pile up on one."""
    if isinstance(error, ConfigError):
        return ConfigError(error.mistakes)
    told = StoreUnavailable(f"store {name}: {type(error).__name__}: {error}", asked=asked)
    told.__cause__ = error
    return told


def packed(commands: Sequence[Command]) -> list[bytes]:
    """The commands as RESP."""
    return [
        command.words if isinstance(command, Spoken) else hiredis.pack_command(command)  # type: ignore[arg-type]  # it says: of one item
        for command in commands
    ]


# ---------------------------------------------------------------- Sentinel


def _asking(service: str) -> Command:
    return ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)


def _master(service: str, answer: Sequence[bytes] | None) -> tuple[str, int]:
    if answer is None:
        raise redis.exceptions.ConnectionError(f"the sentinel knows no service {service!r}")
    host, port = answer
    return host.decode(), int(port)


# ---------------------------------------------------------------- sync: a pool of blocking connections


_MORE: Final = object()
_READ_BYTES: Final = 65_536


class Connection:
    """A blocking connection that redis-py has opened (TCP, TLS, AUTH, SELECT), spoken over without it.

    Its own way to send and read costs three times what the system calls do, for what is not needed here: one
    thread at a time speaks, and reads every reply to what it said.
    """

    def __init__(self, opened: Any) -> None:  # redis-py's connection has no types
        self._opened = opened
        self._socket: socket.socket = opened._sock
        self._reader = hiredis.Reader(replyError=_reply_error, notEnoughData=_MORE)

    def speak(self, commands: Sequence[Command | Spoken]) -> list[Any]:
        """All commands in one write, then all replies; an error reply is a value among them."""
        self._socket.sendall(b"".join(packed(commands)))
        replies: list[Any] = []
        try:
            while len(replies) < len(commands):
                reply = self._reader.gets()
                if reply is not _MORE:
                    replies.append(reply)
                elif data := self._socket.recv(_READ_BYTES):
                    self._reader.feed(data)
                else:
                    raise redis.exceptions.ConnectionError("the server closed the connection")
        except hiredis.HiredisError as error:
            raise redis.exceptions.ConnectionError(f"the server does not speak RESP: {error}") from error
        return replies

    def disconnect(self) -> None:
        self._opened.disconnect()


class Pool:
    """Connections for threads: each is one thread's while it speaks. Idle ones are used again, the latest first."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._idle: deque[Connection] = deque()
        self._places = threading.BoundedSemaphore(address.connections)

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A connection, opened if need be. One that saw an error is closed, and so are the idle ones beside it."""
        if not self._places.acquire(timeout=self.address.timeout):
            raise StoreUnavailable(
                f"store {self.address.name}: all {self.address.connections} connections were busy for"
                f" {self.address.timeout} s; allow more with ?max_connections="
            )
        try:
            connection = self._take() or self._open()
            try:
                yield connection
            except BaseException:
                connection.disconnect()
                self.clear()
                raise
            self._idle.append(connection)
        finally:
            self._places.release()

    def look(self) -> None:
        """Raise unless somebody answers who can serve. The connection is none of the pool's, nor counted by it."""
        connection = self._open()
        try:
            raise_if_away(connection.speak([("PING",)]))
        finally:
            connection.disconnect()

    def _take(self) -> Connection | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def clear(self) -> None:
        while (connection := self._take()) is not None:
            connection.disconnect()

    def _open(self) -> Connection:
        address = self.address
        if address.service is None:
            return self._connect(address.hosts[0], address.username, address.password, address.db)
        error: Exception | None = None
        for host in address.hosts:
            try:
                sentinel = self._connect(host, address.sentinel_username, address.sentinel_password, 0)
            except LINK_ERRORS as away:
                error = away
                continue
            try:
                (answer,) = sentinel.speak([_asking(address.service)])
                found = _master(address.service, answer)
            except LINK_ERRORS as away:
                error = away
                continue
            finally:
                sentinel.disconnect()
            return self._connect(found, address.username, address.password, address.db)
        raise redis.exceptions.ConnectionError(f"no sentinel answered: {error}") from error

    def _connect(self, host: tuple[str, int], username: str | None, password: str | None, db: int) -> Connection:
        address = self.address
        options: dict[str, Any] = {  # redis-py's own, of many types
            "host": host[0],
            "port": host[1],
            "username": username,
            "password": password,
            "db": db,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            "socket_timeout": address.timeout,
            "socket_connect_timeout": address.timeout,
            "socket_keepalive": True,
            "client_name": CLIENT_NAME,
        }
        make: Any = redis.Connection if address.tls is None else redis.SSLConnection
        connection = make(**options, **(address.tls or {}))
        try:
            connection.connect()
        except BaseException:
            connection.disconnect()
            raise
        return Connection(connection)


# ---------------------------------------------------------------- async: one link a loop


class _Waiting(NamedTuple):
    future: asyncio.Future[list[Any]]
    expected: int
    since: float
    replies: list[Any]


#: After this a loop has read what had arrived.
_TURN_SECONDS: Final = 0.01
#: Opening a link takes some turns of the loop, which may be busy; one that is open hears its replies in one.
_OPENING_TIMEOUTS: Final = 4


class Link(asyncio.Protocol):
    """One connection, shared by all tasks of a loop; what they say in one turn of the loop leaves in one write.

    Redis answers in order, so the oldest who waits gets the next reply. Whoever was cancelled stays in the line,
    and its replies are dropped. When the link is lost, or silent for too long, everybody who waits is told.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout: float) -> None:
        self.loop = loop
        self.timeout = timeout
        self.lost: Exception | None = None
        self.ended = False  # with its loop
        self.transport: asyncio.Transport | None = None
        self._reader = hiredis.Reader(replyError=_reply_error, notEnoughData=_MORE)
        self._waiting: deque[_Waiting] = deque()
        self._words: list[bytes] = []
        self._watch: asyncio.TimerHandle | None = None

    def send(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        """Say the commands with the others of this turn; their replies come together."""
        future: asyncio.Future[list[Any]] = self.loop.create_future()
        if self.lost is not None:
            future.set_exception(self.lost)
            return future
        words = packed(commands)
        if not self._words:
            self.loop.call_soon(self._flush)
        self._words += words
        now = self.loop.time()
        self._waiting.append(_Waiting(future, len(words), now, []))
        if self._watch is None:
            self._watch = self.loop.call_at(now + self.timeout, self._look)
        return future

    def drop(self, error: Exception) -> None:
        """Use this link no more."""
        if self.lost is not None:
            return
        self.lost = error
        if self._watch is not None:
            self._watch.cancel()
        if self.transport is not None:
            self.transport.abort()
        waiting, self._waiting = self._waiting, deque()
        for each in waiting:
            if not each.future.done():
                each.future.set_exception(error)

    def _flush(self) -> None:
        words, self._words = self._words, []
        if self.transport is not None and self.lost is None:
            self.transport.write(b"".join(words))

    def _look(self, suspect: _Waiting | None = None) -> None:
        """Has the oldest waited too long? A busy loop may not have read what arrived: it gets a turn to do so."""
        self._watch = None
        if not self._waiting:
            return
        oldest = self._waiting[0]
        due = oldest.since + self.timeout
        if due > self.loop.time():
            self._watch = self.loop.call_at(due, self._look)
        elif oldest is suspect:
            self.drop(redis.exceptions.TimeoutError(f"no reply for {self.timeout} s"))
        else:
            self._watch = self.loop.call_later(_TURN_SECONDS, self._look, oldest)

    # -- what the loop tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one, but does not say so
        raw = transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
            read, waiting = self._reader.gets, self._waiting
            while (reply := read()) is not _MORE:
                future, expected, _, replies = waiting[0]
                replies.append(reply)
                if len(replies) == expected:
                    waiting.popleft()
                    if not future.done():  # else its waiter was cancelled
                        future.set_result(replies)
        except Exception as error:  # no RESP, or a reply that nobody asked for
            self.drop(redis.exceptions.ConnectionError(f"the server does not speak RESP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.drop(redis.exceptions.ConnectionError(f"the server closed the connection: {exc or 'end of stream'}"))


async def open_link(address: Address) -> Link:
    """A link that has said who it is and may be used."""
    if address.service is None:
        return await _open_link(address, address.hosts[0], address.username, address.password, address.db)
    error: Exception | None = None
    for host in address.hosts:
        try:
            sentinel = await _open_link(address, host, address.sentinel_username, address.sentinel_password, 0)
            try:
                (answer,) = await sentinel.send([_asking(address.service)])
            finally:
                sentinel.drop(redis.exceptions.ConnectionError("closed"))
            found = _master(address.service, answer)
        except LINK_ERRORS as away:
            error = away
            continue
        return await _open_link(address, found, address.username, address.password, address.db)
    raise redis.exceptions.ConnectionError(f"no sentinel answered: {error}") from error


async def _open_link(
    address: Address, host: tuple[str, int], username: str | None, password: str | None, db: int
) -> Link:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_OPENING_TIMEOUTS * address.timeout):
            _, link = await loop.create_connection(
                lambda: Link(loop, address.timeout), host[0], host[1], ssl=address.tls_context()
            )
    except TimeoutError as error:
        raise redis.exceptions.TimeoutError(f"no connection to {host[0]}:{host[1]}") from error
    hello: list[Command] = []
    if password is not None:
        hello.append(("AUTH", username, password) if username else ("AUTH", password))
    if db:
        hello.append(("SELECT", db))
    hello.append(("CLIENT", "SETNAME", CLIENT_NAME))
    try:
        replies = await link.send(hello)
    except BaseException as error:
        link.drop(error if isinstance(error, Exception) else redis.exceptions.ConnectionError("given up"))
        raise
    for reply in replies[:-1]:  # a name is nice to have
        if isinstance(reply, Exception):
            link.drop(reply)
            raise reply
    return link

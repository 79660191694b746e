"""The store on Redis or Valkey: the same account for the processes of many machines.

Rule 1. What a caller wants is a conversation (`redis_steps`); this module carries the words to Redis and back, for
        threads over a pool of connections, for tasks over one link a loop.
Rule 2. A conversation whose link was lost says its last words once more, on a new link: they may be said twice.
        Then it is StoreUnavailable, and the breaker keeps the next ones from waiting.
Rule 3. A fork takes nothing along: the child opens its own connections.

The sync and the async face stand one under the other.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

import redis

from llm_guard_mw.errors import ConfigError, GuardError, StoreUnavailable
from llm_guard_mw.logs import log
from llm_guard_mw.stores.protocol import (
    LEFT_ALONE_MS,
    BalanceState,
    ClockApart,
    Done,
    Entries,
    Granted,
    HoldState,
    Refused,
    Renewed,
    Reserve,
    Settled,
    Settlement,
    TooLate,
)
from llm_guard_mw.stores.redis_address import Address, read_url
from llm_guard_mw.stores.redis_client import (
    LINK_ERRORS,
    Breaker,
    Connection,
    Link,
    Pool,
    flawed,
    loading,
    open_link,
    raise_if_away,
    to_load,
    unavailable,
)
from llm_guard_mw.stores.redis_fitness import look_over
from llm_guard_mw.stores.redis_keys import Keys
from llm_guard_mw.stores.redis_steps import Command, Steps, Talk

T = TypeVar("T")


#: So many conversations that nobody waits for share a write.
GROUP_MAX = 128


class RedisStore:
    """The sync face.

    `url` is `redis://`, `rediss://` or `redis+sentinel://`; nothing is opened before the first use. `clock` is for
    tests: the scripts then go by it instead of Redis' own. A reserve is refused with `StoreUnavailable` once nine
    tenths of `journal_max` entries wait for the ledger; a settle never is. `prefix` begins all names of keys.
    """

    def __init__(
        self,
        url: str,
        *,
        clock: Callable[[], int] | None = None,
        journal_max: int = 1_000_000,
        prefix: str = "llm_guard",
    ) -> None:
        address = read_url(url)
        self.steps = Steps(Keys(address.prefix or prefix), clock, journal_max)
        self.engine = _Engine(address, self.steps)

    @property
    def name(self) -> str:
        return f"redis:{self.engine.address.name} {self.steps.keys.prefix}"

    def clock(self) -> int:
        """The store's clock as far as it is known here, in ms; asks nobody."""
        return self.steps.clock()

    def async_face(self) -> AsyncRedisStore:
        return AsyncRedisStore(self)

    def reserve(self, wish: Reserve) -> Granted | Refused | ClockApart | TooLate:
        return self.engine.run(self.steps.reserve(wish))

    def settle(self, settlement: Settlement) -> Settled:
        return self.engine.run(self.steps.settle(settlement))

    def settle_soon(self, settlement: Settlement, done: Done) -> None:
        """Settle without waiting; `done` is told the outcome, on a thread of the store or on the caller's loop."""
        self.engine.post(self.steps.settle(settlement), done)

    def replayed(self, source: str) -> int:
        return self.engine.run(self.steps.replayed(source))

    def end_replay(self, source: str) -> None:
        self.engine.run(self.steps.end_replay(source))

    def renew(self, exchanges: Sequence[str], calls: Sequence[str], lease_ms: int) -> Renewed:
        return self.engine.run(self.steps.renew(exchanges, calls, lease_ms))

    def expire(self, most: int = 1000) -> int:
        return self.engine.run(self.steps.expire(most))

    def forget(self, most: int = 1000) -> int:
        return self.engine.run(self.steps.forget(most))

    def close_call(self, call: str) -> None:
        self.engine.run(self.steps.close_call(call))

    def close_call_soon(self, call: str, done: Done) -> None:
        """Close the call without waiting; `done` as in `settle_soon`."""
        self.engine.post(self.steps.close_call(call), done)

    def admit(self, parent: str, scope: str, value: str, day: int, most: int) -> bool:
        return self.engine.run(self.steps.admit(parent, scope, value, day, most))

    def peek(self, balances: Sequence[str]) -> Sequence[BalanceState]:
        return self.engine.run(self.steps.peek(balances))

    def append(self, entry_id: str, payload: bytes) -> None:
        self.engine.run(self.steps.append(entry_id, payload))

    def append_soon(self, entry_id: str, payload: bytes, done: Done) -> None:
        """Append without waiting; `done` as in `settle_soon`."""
        self.engine.post(self.steps.append(entry_id, payload), done)

    def take_journal(self, consumer: str, count: int, idle_ms: int = LEFT_ALONE_MS) -> Entries:
        return self.engine.run(self.steps.take_journal(consumer, count, idle_ms))

    def drop_journal(self, positions: Sequence[str]) -> None:
        self.engine.run(self.steps.drop_journal(positions))

    def read_journal(self, after: str, count: int) -> Entries:
        return self.engine.run(self.steps.read_journal(after, count))

    def attend(self, for_ms: int) -> None:
        self.engine.run(self.steps.attend(for_ms))

    def attended(self) -> bool:
        return self.engine.run(self.steps.attended())

    def journal_length(self) -> int:
        return self.engine.run(self.steps.journal_length())

    def epoch(self) -> str:
        return self.engine.run(self.steps.epoch())

    def balances(self, after: str, count: int) -> Sequence[BalanceState]:
        return self.engine.run(self.steps.balances(after, count))

    def holds(self, after: str, count: int) -> Sequence[HoldState]:
        return self.engine.run(self.steps.holds(after, count))

    def now(self) -> int:
        return self.engine.run(self.steps.now())

    def close(self) -> None:
        """Do what waits, then let go of the connections. The next use opens others."""
        self.engine.close()


class AsyncRedisStore:
    """The async face of the same store: what a request needs, as coroutines."""

    def __init__(self, store: RedisStore) -> None:
        self.steps = store.steps
        self.engine = store.engine

    async def reserve(self, wish: Reserve) -> Granted | Refused | ClockApart | TooLate:
        return await self.engine.arun(self.steps.reserve(wish))

    async def settle(self, settlement: Settlement) -> Settled:
        return await self.engine.arun(self.steps.settle(settlement))

    async def close_call(self, call: str) -> None:
        await self.engine.arun(self.steps.close_call(call))

    async def admit(self, parent: str, scope: str, value: str, day: int, most: int) -> bool:
        return await self.engine.arun(self.steps.admit(parent, scope, value, day, most))

    async def append(self, entry_id: str, payload: bytes) -> None:
        await self.engine.arun(self.steps.append(entry_id, payload))

    async def peek(self, balances: Sequence[str]) -> Sequence[BalanceState]:
        return await self.engine.arun(self.steps.peek(balances))


# ---------------------------------------------------------------- carrying words


class _Work(NamedTuple):
    talk: Talk[Any]  # each verb has its own result
    done: Done


@dataclass(slots=True)
class _OfLoop:
    """What one event loop has: its link, and the attempt to open one that all its tasks wait for."""

    loop: asyncio.AbstractEventLoop
    link: Link | None = None
    opening: asyncio.Task[Link] | None = None
    end: AsyncGenerator[None, None] | None = None


class _Engine:
    """Carries conversations: threads' over the pool, tasks' over their loop's link, posted ones by a thread."""

    def __init__(self, address: Address, steps: Steps) -> None:
        self.address = address
        self.steps = steps
        self._start_anew()
        _engines.add(self)

    def _start_anew(self) -> None:
        self.pool = Pool(self.address)
        self.breaker = Breaker(self.address.name, self.pool.look)
        self.looked_over = False
        self.loops: dict[int, _OfLoop] = {}
        self.posted: set[asyncio.Task[None]] = set()
        self.queue: SimpleQueue[_Work | None] = SimpleQueue()
        self.thread: threading.Thread | None = None
        self.starting = threading.Lock()

    # -- for threads

    def run(self, talk: Talk[T]) -> T:
        try:
            commands = next(talk)
            while True:
                replies = self._exchange(commands)
                if flawed(replies):
                    self._refuse_errors(replies)
                commands = talk.send(replies)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            talk.close()

    def _converse(self, talks: Sequence[Talk[Any]]) -> list[tuple[Any, BaseException | None]]:
        """Hold some conversations side by side: what they say at the same time leaves in one write."""
        results: list[tuple[Any, BaseException | None]] = [(None, None)] * len(talks)
        said: dict[int, Sequence[Command]] = {}
        for n, talk in enumerate(talks):
            self._go_on(talk, None, n, said, results)
        while said:
            try:
                replies = self._exchange([command for commands in said.values() for command in commands])
            except GuardError as error:
                for n in said:
                    talks[n].close()
                    results[n] = None, error
                break
            start = 0
            for n, commands in list(said.items()):
                del said[n]
                part = replies[start : start + len(commands)]
                start += len(commands)
                self._go_on(talks[n], part, n, said, results)
        return results

    def _go_on(
        self,
        talk: Talk[Any],
        replies: Sequence[Any] | None,
        n: int,
        said: dict[int, Sequence[Command]],
        results: list[tuple[Any, BaseException | None]],
    ) -> None:
        try:
            if replies is not None:
                self._refuse_errors(replies)
            said[n] = next(talk) if replies is None else talk.send(replies)
        except StopIteration as end:
            results[n] = end.value, None
        except Exception as error:
            talk.close()
            results[n] = None, error

    def _refuse_errors(self, replies: Sequence[Any]) -> None:
        for reply in replies:
            if isinstance(reply, Exception):
                raise unavailable(self.address.name, reply)

    def _exchange(self, commands: Sequence[Command]) -> list[Any]:
        self.breaker.check()
        asked = False
        for again in (True, False):
            spoken = False
            try:
                with self.pool.connection() as connection:
                    if not self.looked_over:
                        self._look_over(connection)
                    spoken = True
                    replies = connection.speak(commands)
                    if flawed(replies):
                        missing = to_load(commands, replies)
                        if missing:
                            loaded = connection.speak(loading(commands, missing))
                            for n, reply in zip(missing, loaded[-len(missing) :], strict=True):
                                replies[n] = reply
                        raise_if_away(replies)
            except StoreUnavailable as error:  # no place in the pool, perhaps for the second attempt
                raise unavailable(self.address.name, error, asked=asked) from error
            except (*LINK_ERRORS, ConfigError) as error:
                asked |= spoken
                if not (again and spoken):
                    self.breaker.failed(error)
                    raise unavailable(self.address.name, error, asked=asked) from error
            else:
                self.breaker.worked()
                return replies
        raise AssertionError

    def _look_over(self, connection: Connection) -> None:
        talk = look_over(self.steps, self.address.name)
        commands = next(talk)
        while True:
            replies = connection.speak(commands)
            raise_if_away(replies)
            try:
                commands = talk.send(replies)
            except StopIteration:
                break
        self.looked_over = True

    # -- for tasks

    async def arun(self, talk: Talk[T], commands: Sequence[Command] = ()) -> T:
        """Hold a conversation to its end, from these commands on if it has begun."""
        try:
            commands = commands or next(talk)
            while True:
                replies = await self._aexchange(commands)
                if flawed(replies):
                    self._refuse_errors(replies)
                commands = talk.send(replies)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            talk.close()

    async def _aexchange(self, commands: Sequence[Command]) -> list[Any]:
        self.breaker.check()
        asked = False
        for again in (True, False):
            link = None
            try:
                link = self._ready(asyncio.get_running_loop()) or await self._link()
                replies = await link.send(commands)
                if flawed(replies):
                    missing = to_load(commands, replies)
                    if missing:
                        loaded = await link.send(loading(commands, missing))
                        for n, reply in zip(missing, loaded[-len(missing) :], strict=True):
                            replies[n] = reply
                    raise_if_away(replies)
            except (*LINK_ERRORS, ConfigError) as error:
                if link is not None:
                    link.drop(error)
                asked |= link is not None
                if not (again and link is not None):
                    self.breaker.failed(error)
                    raise unavailable(self.address.name, error, asked=asked) from error
            else:
                self.breaker.worked()
                return replies
        raise AssertionError

    def _ready(self, loop: asyncio.AbstractEventLoop) -> Link | None:
        """The link of this loop, if it is open."""
        own = self.loops.get(id(loop))
        if own is None or own.loop is not loop or own.link is None or own.link.lost is not None:
            return None
        return own.link

    async def _link(self) -> Link:
        loop = asyncio.get_running_loop()
        own = self.loops.get(id(loop))
        if own is None or own.loop is not loop:
            self._forget_dead_loops()
            own = self.loops[id(loop)] = _OfLoop(loop)
            own.end = _until_the_loop_ends(own)
            await anext(own.end)
        if own.link is not None and own.link.lost is None:
            return own.link
        if own.opening is None:
            own.opening = loop.create_task(self._open_link(own))
            own.opening.add_done_callback(_look_at_error)
        return await asyncio.shield(own.opening)

    async def _open_link(self, own: _OfLoop) -> Link:
        try:
            link = await open_link(self.address)
            if not self.looked_over:
                await self._alook_over(link)
            own.link = link
            return link
        finally:
            own.opening = None

    async def _alook_over(self, link: Link) -> None:
        talk = look_over(self.steps, self.address.name)
        commands = next(talk)
        while True:
            replies = await link.send(commands)
            raise_if_away(replies)
            try:
                commands = talk.send(replies)
            except StopIteration:
                break
            except ConfigError as error:
                link.drop(error)
                raise
        self.looked_over = True

    def _forget_dead_loops(self) -> None:
        for key, own in list(self.loops.items()):
            if own.loop.is_closed():
                del self.loops[key]

    # -- for those who do not wait

    def post(self, talk: Talk[Any], done: Done) -> None:
        """From a task it rides on the link of its loop, behind what the task has said before; else a thread does it."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        own = self.loops.get(id(loop)) if loop is not None else None
        if loop is not None and own is not None and own.loop is loop and own.link is not None:
            if own.link.lost is None and self.breaker.error is None:
                self._say(own.link, talk, None, done)
            else:
                self._say_in_a_task(loop, talk, (), done)
            return
        self.queue.put(_Work(talk, done))
        if self.thread is None:
            with self.starting:
                if self.thread is None:
                    self._start_thread()

    def _say(self, link: Link, talk: Talk[Any], replies: Sequence[Any] | None, done: Done) -> None:
        """Say what comes next, and go on when it is answered. Only what goes wrong becomes a task: it is said again."""
        try:
            commands = next(talk) if replies is None else talk.send(replies)
        except StopIteration:
            _tell(done, None)
            return
        except Exception as error:
            _tell(done, error)
            return

        def go_on(answer: asyncio.Future[list[Any]]) -> None:
            error = answer.exception()
            if error is not None and link.ended:
                talk.close()
                _tell(done, StoreUnavailable(f"store {self.address.name}: the event loop ended first"))
            elif error is not None or flawed(answer.result()):
                self._say_in_a_task(link.loop, talk, commands, done)
            else:
                self._say(link, talk, answer.result(), done)

        link.send(commands).add_done_callback(go_on)

    def _say_in_a_task(
        self, loop: asyncio.AbstractEventLoop, talk: Talk[Any], commands: Sequence[Command], done: Done
    ) -> None:
        task = loop.create_task(self._apost(talk, commands, done))
        self.posted.add(task)
        task.add_done_callback(self.posted.discard)

    async def _apost(self, talk: Talk[Any], commands: Sequence[Command], done: Done) -> None:
        try:
            await self.arun(talk, commands)
        except asyncio.CancelledError:
            _tell(done, StoreUnavailable(f"store {self.address.name}: the event loop ended first"))
            raise
        except Exception as error:
            _tell(done, error)
        else:
            _tell(done, None)

    def _start_thread(self) -> None:
        self.thread = threading.Thread(target=self._serve, name="llm-guard-redis", daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            first = self.queue.get()
            group = [first] if first is not None else []
            closing = first is None
            while not closing and len(group) < GROUP_MAX:
                try:
                    work = self.queue.get_nowait()
                except Empty:
                    break
                if work is None:
                    closing = True
                else:
                    group.append(work)
            if group:
                for work, (_, error) in zip(group, self._converse([each.talk for each in group]), strict=True):
                    _tell(work.done, error)
            if closing:
                return

    # -- the end

    def close(self) -> None:
        with self.starting:
            thread, self.thread = self.thread, None
            if thread is not None:
                self.queue.put(None)
                thread.join()
                if not self.queue.empty():  # handed in behind the closing: a new thread takes it
                    self._start_thread()
        self.breaker.close()
        self.pool.clear()
        loops, self.loops = self.loops, {}
        for own in loops.values():
            if own.link is not None and own.loop.is_running():
                own.loop.call_soon_threadsafe(own.link.drop, redis.exceptions.ConnectionError("closed"))


def _tell(done: Done, error: BaseException | None) -> None:
    try:
        done(error)
    except Exception:
        log.exception("store_answer_failed")


def _look_at_error(opening: asyncio.Task[Link]) -> None:
    """All who waited for it may have been cancelled: then nobody else asks."""
    if not opening.cancelled():
        opening.exception()


async def _until_the_loop_ends(own: _OfLoop) -> AsyncGenerator[None, None]:
    """Closes the link in order: a loop that ends closes its async generators, and tells nobody else."""
    try:
        yield
    finally:
        if own.link is not None:
            own.link.ended = True
            own.link.drop(redis.exceptions.ConnectionError("the event loop ended"))


# ---------------------------------------------------------------- fork and exit

_engines: weakref.WeakSet[_Engine] = weakref.WeakSet()

#: What a fork copied into this process: the parent still speaks over it, so it is neither used nor closed.
_inherited: list[object] = []


def _after_fork() -> None:
    for engine in _engines:
        _inherited.append((engine.pool, engine.loops, engine.posted))
        engine._start_anew()


def _at_exit() -> None:
    for engine in list(_engines):
        engine.close()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)

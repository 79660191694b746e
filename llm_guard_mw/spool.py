"""The spool: what this process granted alone is written here, and settled when the store answers again.

One file a process, made when it is first needed, `STORE-SOURCE.spool`: the digest of the store that it is for, and
an id of its own. `spool_records` says what stands in it.

Rule 1. Nothing is granted before its draft is in the file: what could not be booked is refused.
Rule 2. Records are settled in their order, each once: the store keeps how far it has come, and moves that mark in
        the step that settles. A file is removed before its mark is.
Rule 3. A file is locked as long as its process lives. Whoever gets the lock of another one's file finds its owner
        dead, and settles the rest; what was begun there and never ended is booked as it was held.
Rule 4. Damage is told, and costs the records it hit; a file that had any is kept aside as `.damaged`.
Rule 5. A record is in the hands of the system when it is written, so that `kill -9` loses none. It is on the disk
        within a second, by the keeper: to wait for that would cost each call milliseconds, and what a loss of power
        takes is what it takes of the store as well.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from llm_guard_mw import spool_records as records
from llm_guard_mw.errors import GuardError, StoreUnavailable
from llm_guard_mw.logs import log
from llm_guard_mw.spool_records import Begun, Damage, Dropped, Ended, Frame, Header, Refused
from llm_guard_mw.stores.protocol import ProcessStore, Replay, Settled, Settlement

#: Where the spool lies, if not beside the store or the configuration.
FOLDER_VARIABLE: Final = "LLM_GUARD_SPOOL"
#: How large a process' file may grow: about a hundred thousand exchanges.
BYTES_MAX: Final = 256 << 20
#: What is kept free for the end of an exchange that has begun.
_ENDING_BYTES = 8 << 10
#: How often dead processes' files are looked for.
_LOOK_SECONDS = 5.0
_ENDING = ".spool"


def spool_folder(store: str, ledger: str, config: str, environ: Mapping[str, str]) -> Path:
    """LLM_GUARD_SPOOL, else beside the SQLite file of the store or the ledger, else beside the configuration."""
    named = environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    for url in (store, ledger):
        if url.startswith("sqlite:///"):
            return Path(url.removeprefix("sqlite:///")).absolute().parent / "llm_guard.spool"
    beside = Path(config).absolute().parent if Path(config).is_file() else Path.cwd()
    return beside / "llm_guard.spool"


class Spool:
    """One a process; safe to use from many threads. `replay` and `sync` are the keeper's."""

    def __init__(self, folder: Path, store: ProcessStore, *, bytes_max: int = BYTES_MAX) -> None:
        self.folder = folder
        self.store = store
        self.bytes_max = bytes_max
        self.digest = hashlib.blake2b(store.name.encode(), digest_size=6).hexdigest()
        self._start_anew()
        _spools.add(self)

    def _start_anew(self) -> None:
        self._lock = threading.Lock()
        self._own: _Own | None = None
        self._left: list[_Reading] = []  # files without a writer: dead processes', and our own that are complete
        self._look_at = 0.0
        self._strange: set[str] = set()

    # ------------------------------------------------------------ writing

    def begin(self, record: Begun) -> None:
        """Write down what is granted. StoreUnavailable when there is no room, or no way to write."""
        body = records.encode(record)
        if len(body) > records.BODY_BYTES_MAX:
            raise StoreUnavailable("the store is away, and the call's tags are too long to be written down")
        with self._lock:
            try:
                own = self._own or self._make()
                if own.size + len(own.open) * _ENDING_BYTES > self.bytes_max or own.unwritten:
                    raise StoreUnavailable("the store is away, and the spool is full: what is used could not be booked")
                own.append(body)
            except OSError as error:
                unavailable = StoreUnavailable(f"the store is away, and the spool cannot be written: {error.strerror}")
                raise unavailable from error
            own.open.discard(record.takes or "")
            own.open.add(record.exchange)

    def end(self, record: Ended | Dropped) -> None:
        """Write down how an exchange ended. What the disk does not take now waits, and is tried again by `sync`."""
        body = records.encode(record)
        with self._lock:
            own = self._own or self._make()
            own.open.discard(record.exchange)
            if len(body) > records.BODY_BYTES_MAX:  # tags that were added since it began: it is booked as held
                log.error("spool_record_too_long", spool=own.reading.path.name, exchange=record.exchange)
                return
            own.unwritten.append(body)
            own.write_what_waits()

    def note(self, record: Refused) -> bool:
        """Write down what may be left out: only behind what has to be here, and while there is plenty of room."""
        with self._lock:
            own = self._own
            if own is None or own.unwritten or own.size > self.bytes_max // 2:
                return False
            with suppress(OSError):
                own.append(records.encode(record))
                return True
        return False

    def _make(self) -> _Own:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        source = f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(8)}"
        path = self.folder / f"{self.digest}-{source}{_ENDING}"
        fd = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            own = _Own(_Reading(path, fd, source))
            own.append(records.encode(Header(records.VERSION, source, self.store.name)))
        except OSError:
            os.close(fd)
            with suppress(OSError):
                path.unlink()
            raise
        self._own = own
        return own

    def sync(self) -> None:
        """Bring to the disk what was written, and try again what it did not take."""
        with self._lock:
            own = self._own
            if own is None or not own.dirty:
                return
            own.write_what_waits()
            own.dirty = bool(own.unwritten)
            fd = own.reading.fd
        _to_disk(fd)

    # ------------------------------------------------------------ settling

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits here, as far as is known without a look at the folder."""
        return self._own is None and not self._left

    def is_waiting(self) -> bool:
        """Whether there is anything to replay; now and then that takes a look at the folder."""
        self._look_for_the_dead()
        return not self.is_empty

    def replay(self, seconds: float = float("inf")) -> int:
        """Settle what waits, in order, for about so long. Returns how many records. StoreUnavailable ends it."""
        deadline = time.monotonic() + seconds
        self._look_for_the_dead()
        count = 0
        for reading in list(self._left):
            count += reading.settle(self.store, deadline)
            if not reading.is_over(os.fstat(reading.fd).st_size):
                return count
            count += reading.settle_abandoned(self.store)
            self._left.remove(reading)
            self._remove(reading)
        own = self._own
        if own is not None:
            count += own.reading.settle(self.store, deadline, upto=own.size)
            with self._lock:
                if not own.open and not own.unwritten and own.reading.is_over(own.size):
                    self._own = None
                    self._left.append(own.reading)
            if self._own is None:
                return count + self.replay(deadline - time.monotonic())
        return count

    def _look_for_the_dead(self) -> None:
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_SECONDS
        try:
            names = sorted(name for name in os.listdir(self.folder) if name.endswith(_ENDING))
        except OSError:  # nobody has needed one yet
            return
        ours = {reading.path.name for reading in self._left}
        if self._own is not None:
            ours.add(self._own.reading.path.name)
        for name in names:
            if name in ours or name in self._strange:
                continue
            try:
                reading = _adopted(self.folder / name)
            except OSError as error:
                self._strange.add(name)
                log.warning("spool_unreadable", spool=name, reason=str(error))
                continue
            if reading is None:
                continue
            if name.startswith(f"{self.digest}-"):
                self._left.append(reading)
                log.warning("spool_adopted", spool=name)
            else:
                os.close(reading.fd)
                self._strange.add(name)
                log.warning("spool_of_another_store", spool=name, store=_store_of(self.folder / name))

    def _remove(self, reading: _Reading) -> None:
        """The file first, for good; then its mark, which nobody will ask for again."""
        if reading.damaged:
            reading.path.rename(reading.path.with_suffix(".damaged"))
        else:
            reading.path.unlink()
        _sync_folder(self.folder)
        os.close(reading.fd)
        if reading.count:
            log.info("spool_replayed", spool=reading.path.name, records=reading.count, damaged=reading.damaged)
        with suppress(GuardError):  # a mark that stays is a few bytes
            self.store.end_replay(reading.source)

    def close(self) -> None:
        """Let go of the files: whoever comes next settles what is left in them."""
        with self._lock:
            own, self._own = self._own, None
            left, self._left = self._left, []
        if own is not None:
            own.write_what_waits()
            if own.unwritten:
                log.error("spool_lost_records", spool=own.reading.path.name, records=len(own.unwritten))
            _to_disk(own.reading.fd)
            os.close(own.reading.fd)
        for reading in left:
            os.close(reading.fd)


#: macOS has only the other one.
_to_disk: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True)
class _Own:
    """The file that this process writes."""

    reading: _Reading
    size: int = 0
    sequence: int = -1
    open: set[str] = field(default_factory=set)  # exchanges that have begun in it and not ended
    unwritten: deque[bytes] = field(default_factory=deque)
    dirty: bool = False

    def append(self, body: bytes) -> None:
        data = records.frame(self.sequence + 1, body)
        fd = self.reading.fd
        try:
            if os.write(fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                os.ftruncate(fd, self.size)
            self.size = os.fstat(fd).st_size
            raise
        self.sequence += 1
        self.size += len(data)
        self.dirty = True

    def write_what_waits(self) -> None:
        try:
            while self.unwritten:
                self.append(self.unwritten[0])
                self.unwritten.popleft()
        except OSError as error:
            self.dirty = True
            log.error("spool_not_written", spool=self.reading.path.name, reason=str(error), waiting=len(self.unwritten))


@dataclass(slots=True)
class _Reading:
    """How far a file has been settled by this process, which has its lock."""

    path: Path
    fd: int
    source: str
    offset: int = 0
    sequence: int = -1  # of the latest frame
    mark: int | None = None  # how far the store has settled it already
    begun: dict[str, Begun] = field(default_factory=dict)  # what has not ended, as far as was read
    count: int = 0
    damaged: bool = False

    def is_over(self, size: int) -> bool:
        return self.offset >= size

    def settle(self, store: ProcessStore, deadline: float, upto: int | None = None) -> int:
        """Settle what stands from here on, until the deadline."""
        size = os.fstat(self.fd).st_size if upto is None else upto
        if self.is_over(size):
            return 0
        before = self.count
        with mmap.mmap(self.fd, size, access=mmap.ACCESS_READ) as data:
            for found in records.frames(data, self.offset):
                if isinstance(found, Damage):
                    self._tell(found)
                else:
                    self._miss_none(found)
                    self._take(store, found)
                    self.sequence = found.sequence
                self.offset = found.end
                if time.monotonic() > deadline:
                    break
        return self.count - before

    def _take(self, store: ProcessStore, found: Frame) -> None:
        try:
            record = records.decode(found.body)
        except msgspec.MsgspecError as error:
            self._put_aside(found.sequence, f"{type(error).__name__}: {error}")
            return
        if isinstance(record, Begun):
            self.begun.pop(record.takes or "", None)
            self.begun[record.exchange] = record
        elif isinstance(record, Dropped):
            self.begun.pop(record.exchange, None)
        elif isinstance(record, Refused):
            store.append(record.id, bytes(record.event))  # a row that is there already is no second one in the books
        elif isinstance(record, Ended):
            self._settle(store, found.sequence, partial(records.settlement_of, record))
            self.begun.pop(record.exchange, None)
        elif record.version != records.VERSION:
            self._put_aside(found.sequence, f"written by version {record.version}, known is {records.VERSION}")

    def settle_abandoned(self, store: ProcessStore) -> int:
        """Book what was begun and never ended, behind the last record: the file is complete, and so these places."""
        for place, record in enumerate(self.begun.values(), self.sequence + 1):
            self._settle(store, place, partial(records.settlement_of_abandoned, record))
        if self.begun:
            log.warning("spool_abandoned", spool=self.path.name, exchanges=len(self.begun))
        return len(self.begun)

    def _settle(self, store: ProcessStore, place: int, make: Callable[[Replay, int], Settlement]) -> None:
        if self.mark is None:
            self.mark = store.replayed(self.source)
        if place <= self.mark:
            return
        try:
            outcome = store.settle(make(Replay(self.source, place), store.clock()))
        except GuardError:
            raise
        except Exception as error:  # of a number that no store can hold: the others are settled all the same
            self._put_aside(place, f"{type(error).__name__}: {error}")
            return
        self.count += 1
        if outcome is Settled.TOO_LATE:
            log.error("settle_too_late", spool=self.path.name, record=place)

    # -- what is told

    def _tell(self, found: Damage) -> None:
        size = found.end - found.start
        if found.torn:
            log.warning("spool_torn", spool=self.path.name, offset=found.start, bytes=size)
        else:
            self.damaged = True
            log.error("spool_damaged", spool=self.path.name, offset=found.start, bytes=size)

    def _miss_none(self, found: Frame) -> None:
        missing = found.sequence - self.sequence - 1
        if missing:
            self.damaged = True
            log.error("spool_records_missing", spool=self.path.name, before=found.sequence, records=missing)

    def _put_aside(self, place: int, reason: str) -> None:
        self.damaged = True
        log.error("spool_record_put_aside", spool=self.path.name, record=place, reason=reason)


def _adopted(path: Path) -> _Reading | None:
    """The file of a process that is gone; None if it lives. OSError if the file is not for us."""
    try:
        fd = os.open(path, _FLAGS)
    except FileNotFoundError:  # somebody else has settled it
        return None
    reading = None
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid():
            raise PermissionError(f"it belongs to the user {found.st_uid}")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:
            reading = _Reading(path, fd, path.stem.partition("-")[2])
    except BlockingIOError:  # its process lives
        pass
    finally:
        if reading is None:
            os.close(fd)
    return reading


def _store_of(path: Path) -> str:
    """The store that a file says it is for."""
    with suppress(OSError, msgspec.MsgspecError), path.open("rb") as file:
        for found in records.frames(file.read(4096)):
            record = records.decode(found.body) if isinstance(found, Frame) else None
            return record.store if isinstance(record, Header) else "unreadable"
    return "unreadable"


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---------------------------------------------------------------- fork

_spools: weakref.WeakSet[Spool] = weakref.WeakSet()


def _after_fork() -> None:
    """The files are the parent's, and so are their locks, for as long as it has them open."""
    for spool in _spools:
        readings = [*spool._left, *([spool._own.reading] if spool._own is not None else [])]
        for reading in readings:
            os.close(reading.fd)
        spool._start_anew()


os.register_at_fork(after_in_child=_after_fork)

"""Who calls the example app: five people and a batch job of two tenants, each with a habit that some limit ends."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

TIMEOUT_SECONDS = 30

_TOPICS = (
    "the tides", "a sourdough starter", "double-entry books", "the migration of swifts", "how locks fail",
    "a rusty bicycle", "the night train to Lisbon", "why bread rises", "the invention of zero", "a lighthouse keeper",
    "the smell of rain", "how glass is made", "an honest invoice", "the weight of clouds", "a walk on Mars",
)  # fmt: skip

_HOUSE_STYLE = "Short sentences please. Say who did what and what it cost."

#: So long a refused caller looks at the refusal.
_REFUSED_SECONDS = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Person:
    """Somebody with a habit: how many of every hundred calls, of which feature, how long, how many at once."""

    user: str
    tenant: str
    tier: str
    share: int
    habits: Mapping[str, int]  # feature to weight
    words: int  # how long an answer they ask for, or a text they bring
    at_once: int = 1


PEOPLE = (
    Person("ada", "acme", "pro", 12, {"chat": 5, "summarize": 1}, words=330),  # spends her chat's day
    Person("ben", "acme", "free", 14, {"chat": 3, "stream": 1}, words=100),  # spends his tier's day
    Person("nightly", "acme", "pro", 28, {"summarize": 1}, words=2400, at_once=2),  # spends the tenant's month
    Person("cleo", "globex", "pro", 14, {"stream": 8, "chat": 1}, words=70),  # runs into requests a minute
    Person("dan", "globex", "free", 12, {"chat": 2, "stream": 1}, words=40, at_once=3),  # has three tabs open
    Person("eve", "globex", "pro", 20, {"chat": 2, "stream": 1, "summarize": 2}, words=50),  # is never refused
)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to the example app."""

    feature: str
    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    person: Person
    feature: str
    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def problem(self) -> dict[str, Any]:  # foreign JSON
        """The body of a refusal."""
        found: dict[str, Any] = json.loads(self.body)
        return found

    def retry_after(self) -> int | None:
        """Seconds, as the header says."""
        said = dict(self.headers).get("retry-after")
        return None if said is None else int(said)


def asks(calls: int, seed: int) -> dict[Person, list[Ask]]:
    """`calls` requests, handed out by each one's share; the same seed asks the same."""
    dice = random.Random(seed)  # noqa: S311 - a plot, not a secret
    return {person: [_ask(person, dice) for _ in range(count)] for person, count in _shares(calls)}


def _shares(calls: int) -> Iterator[tuple[Person, int]]:
    before = done = 0
    for person in PEOPLE:
        before += person.share
        count = calls * before // 100 - done
        done += count
        yield person, count


def _ask(person: Person, dice: random.Random) -> Ask:
    (feature,) = dice.choices(list(person.habits), list(person.habits.values()))
    if feature == "summarize":
        return Ask(feature, _report(dice, person.words))
    verb = dice.choice(("Explain", "Describe", "Think about", "Tell me about"))
    return Ask(feature, f"{verb} {dice.choice(_TOPICS)} in {person.words} words.")


def _report(dice: random.Random, words: int) -> str:
    """A text worth a summary. Half of it is the same each day, so the provider has that in its cache."""
    house_style = [*_HOUSE_STYLE.split()] * (words // 22)
    news = [word for _ in range(words // 2) for word in dice.choice(_TOPICS).split()][: words - len(house_style)]
    return " ".join((*house_style, *news))


def drive(host: str, port: int, crowd: Mapping[Person, Sequence[Ask]]) -> list[Answer]:
    """Send it all, everybody at once, each with as many connections as they have tabs open."""
    answers: list[Answer] = []
    faults: list[Exception] = []
    tabs = []
    for person, wanted in crowd.items():
        waiting = deque(wanted)
        for _ in range(person.at_once):
            tabs.append(threading.Thread(target=_tab, args=(host, port, person, waiting, answers, faults), daemon=True))
    for tab in tabs:
        tab.start()
    for tab in tabs:
        tab.join()
    if faults:
        raise faults[0]
    return answers


def _tab(
    host: str, port: int, person: Person, waiting: deque[Ask], answers: list[Answer], faults: list[Exception]
) -> None:
    connection = HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
    try:
        while waiting and not faults:
            try:
                ask = waiting.popleft()
            except IndexError:  # another tab was faster
                return
            answer = _send(connection, person, ask)
            answers.append(answer)
            if answer.status == 429:
                time.sleep(_REFUSED_SECONDS)
    except Exception as error:  # told by whoever started the thread
        faults.append(error)
    finally:
        connection.close()


def _send(connection: HTTPConnection, person: Person, ask: Ask) -> Answer:
    headers = {
        "content-type": "application/json",
        "x-user-id": person.user,
        "x-tenant-id": person.tenant,
        "x-plan": person.tier,
    }
    connection.request("POST", f"/{ask.feature}", json.dumps({"text": ask.text}), headers)
    response = connection.getresponse()
    body = response.read()
    return Answer(person, ask.feature, response.status, response.reason, tuple(response.getheaders()), body)


def wait_until_healthy(host: str, port: int, seconds: float, gone: Any) -> bool:
    """Ask /health until it answers; `gone()` says that nobody ever will."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not gone():
        connection = HTTPConnection(host, port, timeout=1)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            time.sleep(0.05)
        finally:
            connection.close()
    return False

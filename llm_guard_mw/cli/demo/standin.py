"""A provider that costs nothing: the wire formats of OpenAI, Anthropic and Gemini over deterministic text.

It keeps its own books, so that a test or a demo can compare what was metered with what was really served:
`GET /_served` gives the totals a model and one row a request, `DELETE /_served` starts over.

What goes wrong with a provider is asked for in a request header, `x-standin: status=429, times=1, id=a`:

    first-byte-ms, gap-ms   how long the first byte takes, and each later piece of a stream
    status, retry-after     answer with this error; `times=N` only the first N requests with the same `id`
    cut=N                   break the connection after N pieces
    stop=N                  end the stream after N pieces, without its end marks and without usage
    gzip=1                  compress, if the client accepts that
    words=N                 how long the reply is (the prompt may say so too: "in 40 words")

Run it with `python -m llm_guard_mw.cli.demo.standin --port 8001`, or inside a process with `running()`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import secrets
import socket
import threading
import zlib
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Self

from llm_guard_mw.cli.demo.wires import ERRORS, WIRES, Piece, Prompt, Reply, Wire, write

#: A prefix this long comes from the provider's cache when it is seen again, in steps of 128 tokens.
CACHEABLE_TOKENS = 1024

_ROWS_MAX = 100_000
_PREFIXES_MAX = 10_000
_MODELS = (
    "gpt-4o",
    "gpt-4o-mini",
    "text-embedding-3-small",
    "claude-sonnet-4-6",
    "claude-haiku-4-5",
    "gemini-2.5-flash",
)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Knobs:
    """How a request is to be treated; see the module's docstring."""

    first_byte_ms: int = 0
    gap_ms: int = 0
    status: int = 200
    retry_after: str = ""
    times: int = 0
    id: str = ""
    cut: int | None = None
    stop: int | None = None
    gzip: bool = False
    words: int | None = None

    def turned(self, header: str) -> Knobs:
        """These knobs with what the header says."""
        given = dict(item.strip().split("=", 1) for item in header.split(",") if "=" in item)
        texts = {name: given.pop(name) for name in ("retry-after", "id") if name in given}
        numbers = {name.replace("-", "_"): int(value) for name, value in given.items()}
        changed: dict[str, Any] = {**numbers, **{name.replace("-", "_"): text for name, text in texts.items()}}
        return replace(self, **changed)


@dataclass(slots=True)
class Row:
    """One request in the stand-in's own books. It grows while a stream is on its way."""

    id: str
    api: str
    model: str
    status: int = 200
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0
    stream: bool = False
    complete: bool = False


class StandIn:
    """The ASGI application. One instance has one set of books."""

    def __init__(self, knobs: Knobs = Knobs()) -> None:
        self.rows: deque[Row] = deque(maxlen=_ROWS_MAX)
        self.arrived = 0  # requests whose body is here, answered or not
        self._knobs = knobs
        self._seen: set[tuple[str, int]] = set()
        self._failed: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        body = await _read(receive)
        self.arrived += 1
        path, method = scope["path"], scope["method"]
        wire, model = _wire(path)
        async with _Answer(receive, send, headers) as answer:
            if path == "/_served":
                if method == "DELETE":
                    self.rows.clear()
                await answer.json(200, self.served())
            elif method == "GET":
                await answer.json(200, _models(path, headers))
            elif wire is None:
                await answer.error("openai", 404, f"Invalid URL ({method} {path})")
            else:
                await self._serve(wire, model, body, scope, headers, answer)

    def served(self) -> dict[str, Any]:
        """The books: totals over all, totals a model, and the rows."""
        models: dict[str, Counter[str]] = {}
        for row in self.rows:
            if row.status == 200:
                total = models.setdefault(row.model, Counter())
                total["requests"] += 1
                for name in (
                    "input_tokens",
                    "output_tokens",
                    "cached_tokens",
                    "cache_write_tokens",
                    "reasoning_tokens",
                ):
                    total[name] += getattr(row, name)
        everything: Counter[str] = Counter()
        for total in models.values():
            everything.update(total)
        return {"total": everything, "models": models, "rows": [asdict(row) for row in self.rows]}

    async def _serve(
        self, wire: Wire, model: str | None, body: bytes, scope: Scope, headers: Mapping[str, str], answer: _Answer
    ) -> None:
        family = wire.api.partition(".")[0]
        try:
            knobs = self._knobs.turned(headers.get("x-standin", ""))
            prompt = wire.parse(json.loads(body), model)
        except (ValueError, KeyError, TypeError, AttributeError) as mistake:
            await answer.error(family, 400, f"The request could not be read: {mistake!r}")
            return
        prompt = replace(
            prompt,
            words=knobs.words,
            sse=b"alt=sse" in scope["query_string"] or family != "gemini",
            stream=prompt.stream or scope["path"].endswith(":streamGenerateContent"),
        )
        await asyncio.sleep(knobs.first_byte_ms / 1000)
        status = self._status(knobs, headers)
        if status != 200:
            self.rows.append(Row(answer.request_id, wire.api, prompt.model, status=status))
            message = "No key was given." if status == 401 else f"The stand-in was asked for a {status}."
            await answer.error(family, status, message, retry_after=knobs.retry_after)
            return

        reply = write(prompt, **self._cached(wire, prompt))
        if not wire.counts:
            await answer.json(200, wire.whole(prompt, reply))
            return
        row = Row(
            id=reply.id,
            api=wire.api,
            model=prompt.model,
            input_tokens=reply.input_tokens,
            cached_tokens=reply.cached_tokens,
            cache_write_tokens=reply.cache_write_tokens,
            stream=prompt.stream,
        )
        self.rows.append(row)
        if prompt.stream and wire.pieces is not None:
            await self._stream(wire.pieces(prompt, reply), prompt, reply, row, knobs, answer)
            return
        if wire.writes:
            row.output_tokens = reply.output_tokens
            row.reasoning_tokens = reply.reasoning_tokens * prompt.choices
        row.complete = await answer.json(200, wire.whole(prompt, reply), gzip=knobs.gzip, cut=knobs.cut is not None)

    def _status(self, knobs: Knobs, headers: Mapping[str, str]) -> int:
        if not any(headers.get(name) for name in ("authorization", "x-api-key", "x-goog-api-key", "api-key")):
            return 401
        if knobs.status == 200 or (knobs.times and self._failed[knobs.id] >= knobs.times):
            return 200
        self._failed[knobs.id] += 1
        return knobs.status

    async def _stream(
        self, pieces: Iterator[Piece], prompt: Prompt, reply: Reply, row: Row, knobs: Knobs, answer: _Answer
    ) -> None:
        kind = "text/event-stream; charset=utf-8" if prompt.sse else "application/json; charset=UTF-8"
        await answer.begin(200, {"content-type": kind}, gzip=knobs.gzip)
        for number, (piece, out) in enumerate(pieces):
            if number == knobs.cut:
                return  # no end of the body: the server drops the connection
            if number == knobs.stop:
                break
            if number:
                await asyncio.sleep(knobs.gap_ms / 1000)
            if not await answer.send(piece):
                return
            row.output_tokens = out
            row.reasoning_tokens = min(out, reply.reasoning_tokens * prompt.choices)
        else:
            row.output_tokens = reply.output_tokens
            row.complete = True
        await answer.end()

    def _cached(self, wire: Wire, prompt: Prompt) -> dict[str, int]:
        """What of this prompt the provider had in its cache, and what it puts there (Anthropic bills that)."""
        prefix = prompt.input_tokens // 128 * 128
        if not wire.writes or not wire.counts or prefix < CACHEABLE_TOKENS:
            return {}
        words = " ".join(prompt.texts).split()[:CACHEABLE_TOKENS]
        name = (prompt.model, hash(tuple(words)))
        seen = name in self._seen
        if len(self._seen) >= _PREFIXES_MAX:
            self._seen.clear()
        self._seen.add(name)
        if wire.api == "anthropic.messages":
            if not prompt.marks_cache:
                return {}
            return {"cached_tokens": prefix} if seen else {"cache_write_tokens": prefix}
        return {"cached_tokens": prefix} if seen else {}


class _Answer:
    """One response on its way out. It watches for a client that hangs up."""

    def __init__(self, receive: Receive, send: Send, headers: Mapping[str, str]) -> None:
        self.request_id = f"req_{secrets.token_hex(12)}"
        self._send = send
        self._receive = receive
        self._accepts_gzip = "gzip" in headers.get("accept-encoding", "")
        self._deflate: Any = None  # zlib has no public type for a compressor
        self._gone: asyncio.Future[Message] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._gone is not None:
            self._gone.cancel()

    async def json(
        self,
        status: int,
        body: Mapping[str, Any],
        headers: Mapping[str, str] = MappingProxyType({}),
        *,
        gzip: bool = False,
        cut: bool = False,
    ) -> bool:
        """Send a whole JSON body; says whether it went out to its end."""
        data = json.dumps(body, ensure_ascii=False).encode()
        await self.begin(status, {"content-type": "application/json", **headers}, gzip=gzip)
        if cut:
            await self.send(data[: len(data) // 2])
            return False
        await self.send(data)
        await self.end()
        return True

    async def error(self, family: str, status: int, message: str, *, retry_after: str = "") -> None:
        headers = {"retry-after": retry_after} if retry_after else {}
        await self.json(status, ERRORS[family](status, message, self.request_id), headers)

    async def begin(self, status: int, headers: Mapping[str, str], *, gzip: bool = False) -> None:
        fields = {**headers, "x-request-id": self.request_id, "request-id": self.request_id}
        if gzip and self._accepts_gzip:
            self._deflate = zlib.compressobj(wbits=31)
            fields["content-encoding"] = "gzip"
        raw = [(name.encode(), value.encode()) for name, value in fields.items()]
        self._gone = asyncio.ensure_future(self._receive())
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def send(self, data: bytes) -> bool:
        """Send a piece; False once the client has gone."""
        # The watcher has to be given a turn to see the disconnect.
        await asyncio.sleep(0)
        if self._gone is not None and self._gone.done():
            return False
        if self._deflate is not None:
            data = self._deflate.compress(data) + self._deflate.flush(zlib.Z_SYNC_FLUSH)
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        return True

    async def end(self) -> None:
        tail = self._deflate.flush() if self._deflate is not None else b""
        await self._send({"type": "http.response.body", "body": tail, "more_body": False})


async def _live(receive: Receive, send: Send) -> None:
    while (message := await receive())["type"] != "lifespan.shutdown":
        await send({"type": f"{message['type']}.complete"})
    await send({"type": "lifespan.shutdown.complete"})


async def _read(receive: Receive) -> bytes:
    chunks = []
    while True:
        message = await receive()
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(chunks)


def _wire(path: str) -> tuple[Wire | None, str | None]:
    """The format served at this path, and the model that the path names, if it does."""
    parts = path.split("/")
    wire = next((wire for end, wire in WIRES.items() if path.endswith(end)), None)
    for before in ("models", "deployments"):
        if before in parts[:-1]:
            return wire, parts[parts.index(before) + 1].partition(":")[0]
    return wire, None


def _models(path: str, headers: Mapping[str, str]) -> dict[str, Any]:
    if "x-goog-api-key" in headers:
        return {"models": [{"name": f"models/{name}", "version": "001"} for name in _MODELS]}
    if "anthropic-version" in headers:
        data = [
            {"type": "model", "id": name, "display_name": name, "created_at": "2026-01-01T00:00:00Z"}
            for name in _MODELS
        ]
        return {"data": data, "has_more": False, "first_id": _MODELS[0], "last_id": _MODELS[-1]}
    listed = [{"id": name, "object": "model", "created": 1767225600, "owned_by": "stand-in"} for name in _MODELS]
    one = next((model for model in listed if path.endswith(f"/{model['id']}")), None)
    return one or {"object": "list", "data": listed}


@contextlib.contextmanager
def running(app: StandIn | None = None, *, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve in a thread of this process; gives the base URL. The socket listens before the first line of the block."""
    import uvicorn

    listener = socket.create_server((host, port))
    server = uvicorn.Server(uvicorn.Config(app or StandIn(), log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="stand-in provider", daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        # Streams that nobody reads any more must not keep the process waiting.
        server.force_exit = True
        thread.join(timeout=5)
        listener.close()


def main(arguments: list[str] | None = None) -> None:
    import uvicorn

    parser = argparse.ArgumentParser(prog="standin", description="A stand-in for OpenAI, Anthropic and Gemini.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--first-byte-ms", type=int, default=0)
    parser.add_argument("--gap-ms", type=int, default=0)
    given = parser.parse_args(arguments)
    knobs = Knobs(first_byte_ms=given.first_byte_ms, gap_ms=given.gap_ms)
    print(f"the stand-in provider listens on http://{given.host}:{given.port}", flush=True)  # noqa: T201 - a program
    uvicorn.run(StandIn(knobs), host=given.host, port=given.port, log_level="warning")


if __name__ == "__main__":
    main()

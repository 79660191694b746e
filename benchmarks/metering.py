"""What metering costs: a chunk of a stream beside meters that parse each one, and a small answer. CPU, in turn.

The chunks are of 330 bytes, as a chat's are. `json` and `msgspec` split the events and parse every one, as a meter
does that looks for `usage` in each; `scan` searches each chunk with a regular expression and parses what it finds.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from llm_guard_mw.metering import Meter

ROUNDS = 40
CHUNKS = 1000
ANSWERS = 500

USAGE = {
    "prompt_tokens": 1200,
    "completion_tokens": 310,
    "total_tokens": 1510,
    "prompt_tokens_details": {"cached_tokens": 1024, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 192, "audio_tokens": 0},
}
HEAD = {"id": "chatcmpl-9f8e7d6c5b4a39281706", "created": 1763697600, "model": "gpt-4o-2024-08-06"}


class Fed(Protocol):
    def feed(self, chunk: bytes) -> None: ...
    def finish(self) -> object: ...


def main() -> None:
    chunk = _event({"delta": {"content": " the tide turns"}}, usage=None)
    last = _event(None, usage=USAGE) + b"data: [DONE]\n\n"
    print(f"a chunk of {len(chunk)} bytes, in a stream of {CHUNKS} (us CPU: median, least)")
    makers: dict[str, Callable[[], Fed]] = {
        "this meter": lambda: Meter("openai.chat", provider="openai", content_type="text/event-stream"),
        "scan": Scanning,
        "msgspec": lambda: Parsing(msgspec.json.decode),
        "json": lambda: Parsing(json.loads),
    }
    _compare({name: lambda make=make: _stream(make, chunk, last) for name, make in makers.items()}, CHUNKS)

    print(f"an answer: made, fed, finished (us CPU: median, least; {ANSWERS} a round)")
    cases = {f"{name}, {len(body)} bytes": (api, body) for name, (api, body) in _answers().items()}
    _compare({name: lambda case=case: _answer(*case) for name, case in cases.items()}, ANSWERS)


def _compare(runs: dict[str, Callable[[], None]], per_run: int) -> None:
    """One run of each in every round, so that a busy machine is unfair to all of them alike."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            began = time.process_time_ns()
            run()
            taken[name].append((time.process_time_ns() - began) / per_run / 1000)
    for name, times in taken.items():
        print(f"  {name:34} {statistics.median(times):7.2f} {min(times):7.2f}")


def _stream(make: Callable[[], Fed], chunk: bytes, last: bytes) -> None:
    meter = make()
    feed = meter.feed
    for _ in range(CHUNKS):
        feed(chunk)
    feed(last)
    assert meter.finish() is not None


def _answer(api: str | None, body: bytes) -> None:
    for _ in range(ANSWERS):
        meter = Meter(api, content_type="application/json", request_model="gpt-4o")
        meter.feed(body)
        meter.finish()


def _event(choice: dict[str, Any] | None, usage: dict[str, Any] | None) -> bytes:
    choices = [] if choice is None else [{"index": 0, **choice, "logprobs": None, "finish_reason": None}]
    doc = {**HEAD, "object": "chat.completion.chunk", "service_tier": "default", "choices": choices, "usage": usage}
    return b"data: " + json.dumps({**doc, "system_fingerprint": "fp_a288987b44"}).encode() + b"\n\n"


def _answers() -> dict[str, tuple[str | None, bytes]]:
    text = "The tides follow the moon, which pulls at the near side of the sea more than at the earth beneath it."
    message = {"role": "assistant", "content": text, "refusal": None}
    chat = {
        **HEAD,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
    }
    claude = {
        "id": "msg_01",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-4-6",
        "content": [{"type": "text", "text": text}],
        "stop_reason": "end_turn",
        "usage": {
            "input_tokens": 12,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
            "output_tokens": 9,
            "service_tier": "standard",
        },
    }
    return {
        "an app's own JSON": (None, json.dumps({"answer": text * 5}).encode()),
        "openai.chat": ("openai.chat", json.dumps(chat).encode()),
        "openai.chat, unnamed": (None, json.dumps(chat).encode()),
        "anthropic.messages": ("anthropic.messages", json.dumps(claude).encode()),
    }


# ---------------------------------------------------------------- what it is compared with


class Parsing:
    """Splits the stream into events and parses each."""

    def __init__(self, loads: Callable[[bytes], Any]) -> None:
        self._loads = loads
        self._rest = b""
        self._usage: object = None

    def feed(self, chunk: bytes) -> None:
        *events, self._rest = (self._rest + chunk).split(b"\n\n")
        for event in events:
            data = event.removeprefix(b"data: ")
            if data != b"[DONE]":
                self._usage = self._loads(data).get("usage") or self._usage

    def finish(self) -> object:
        return self._usage


class Scanning:
    """Looks for a usage object in the bytes, and parses the events that have one."""

    _USAGE = re.compile(rb'"usage"\s*:\s*\{')

    def __init__(self) -> None:
        self._rest = b""
        self._found: Sequence[Any] = ()

    def feed(self, chunk: bytes) -> None:
        data = self._rest + chunk if self._rest else chunk
        end = data.rfind(b"\n") + 1
        self._rest = data[end:]
        if self._USAGE.search(data, 0, end):
            lines = data[:end].split(b"\n")
            self._found = [json.loads(line[6:]) for line in lines if self._USAGE.search(line)]

    def finish(self) -> object:
        return self._found[-1]["usage"]


if __name__ == "__main__":
    main()

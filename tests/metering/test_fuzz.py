"""Answers of every format, broken in every way that a few thousand tries find.

Each input is a golden answer, or a recorded one where the corpus lies beside the checkout, of which pieces were cut,
doubled, swapped, mixed with another's, or had their values replaced. `LLM_GUARD_HYPOTHESIS=deep` tries many more; the
run says at its end how many were tried and what memory they left behind.
"""

from __future__ import annotations

import gc
import gzip
import json
import os
import random
import re
import tracemalloc
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache

from llm_guard_mw.metering import API_NAMES, PROVIDER_NAMES, Meter, read_usage
from llm_guard_mw.model import Usage
from tests.corpus.test_corpus import body_of, rows
from tests.metering.test_golden_answers import GOLDEN, NAMES

DEEP = os.environ.get("LLM_GUARD_HYPOTHESIS") == "deep"
TRIES = 200_000 if DEEP else 3_000
SEED = int(os.environ.get("LLM_GUARD_FUZZ_SEED", "20261121"))
#: What a body of a few kilobytes may leave behind after thousands of its kind: caches of regular expressions and such.
LEFT_BEHIND_BYTES = 256 * 1024

VALUE = re.compile(rb":([^,}\n]*)")
VALUES = (
    *(b"-1", b"0", b"1e999", b"-1e-999", b"9" * 400, b"9007199254740993", b"1.5", b"NaN", b"-Infinity"),
    *(b"null", b"true", b'""', b'"7"', b"[]", b"{}", b"[[[[]]]]", b'{"":{"":0}}', b'"\\ud800"', b"\xff\xfe"),
)
TOKENS = (b"\n\n", b"\r\n", b"data:", b"data: [DONE]\n\n", b":", b",", b"{", b"}", b"[", b"]", b'"', b"\\", b"\x00")

Mutation = Callable[[random.Random, bytearray, Sequence[bytes]], None]


@lru_cache
def seeds() -> tuple[bytes, ...]:
    golden = [(GOLDEN / name).read_bytes() for name in NAMES]
    recorded = [body for row in rows() if 0 < len(body := body_of(row)) <= 20_000]
    return (*golden, *recorded)


def cut(chance: random.Random, body: bytearray, others: Sequence[bytes]) -> None:
    del body[chance.randrange(len(body) + 1) :]


def lose(chance: random.Random, body: bytearray, others: Sequence[bytes]) -> None:
    at = chance.randrange(len(body) + 1)
    del body[at : at + chance.randrange(200)]


def double(chance: random.Random, body: bytearray, others: Sequence[bytes]) -> None:
    at = chance.randrange(len(body) + 1)
    body[at:at] = body[at : at + chance.randrange(400)] * chance.randrange(1, 4)


def flip(chance: random.Random, body: bytearray, others: Sequence[bytes]) -> None:
    for _ in range(chance.randrange(1, 8)):
        if body:
            body[chance.randrange(len(body))] = chance.randrange(256)


def replace_value(chance: random.Random, body: bytearray, others: Sequence[bytes]) -> None:
    """The value behind some colon becomes another one, of any type."""
    value = VALUE.search(body, chance.randrange(len(body) + 1))
    if value is not None:
        body[value.start(1) : value.end(1)] = chance.choice(VALUES)


def add_token(chance: random.Random, body: bytearray, others: Sequence[bytes]) -> None:
    at = chance.randrange(len(body) + 1)
    body[at:at] = chance.choice(TOKENS) * chance.choice((1, 1, 2, 50))


def mix(chance: random.Random, body: bytearray, others: Sequence[bytes]) -> None:
    other = chance.choice(others)
    start = chance.randrange(len(other) + 1)
    at = chance.randrange(len(body) + 1)
    body[at:at] = other[start : start + chance.randrange(2000)]


def swap_names(chance: random.Random, body: bytearray, others: Sequence[bytes]) -> None:
    pairs = ((b"usage", b"usageMetadata"), (b"input_tokens", b"prompt_tokens"), (b"type", b"object"), (b"id", b"usage"))
    old, new = chance.choice(pairs)
    body[:] = bytes(body).replace(b'"' + old + b'"', b'"' + new + b'"')


MUTATIONS: tuple[Mutation, ...] = (cut, lose, double, flip, replace_value, replace_value, add_token, mix, swap_names)


def mutated(chance: random.Random) -> bytes:
    body = bytearray(chance.choice(seeds()))
    for _ in range(chance.choice((0, 1, 1, 2, 3, 6))):
        chance.choice(MUTATIONS)(chance, body, seeds())
    return bytes(body[:100_000])


def packed(chance: random.Random, body: bytes) -> tuple[bytes, str | None]:
    coding = chance.choice((None, None, None, "gzip", "deflate", "br", "zstd", "nonsense"))
    if coding == "gzip":
        body = gzip.compress(body, 1)
    elif coding == "deflate":
        body = zlib.compress(body, 1)
    if coding and chance.random() < 0.3 and body:
        body = body[: chance.randrange(len(body))]
    return body, coding


def is_sound(usage: Usage) -> bool:
    counts = [getattr(usage, name) for name in usage.__slots__ if name.endswith("_tokens")]
    parts = list(usage.parts.items())
    return (
        all(count is None or (type(count) is int and 0 <= count <= 2**53) for count in counts)
        and all(type(name) is str and type(count) is int and count >= 0 for name, count in parts)
        and len(parts) < 200
        and (usage.model is None or len(usage.model) <= 256)
    )


def try_one(chance: random.Random) -> None:
    body, coding = packed(chance, mutated(chance))
    api = chance.choice((*API_NAMES, "auto", None))
    provider = chance.choice((*PROVIDER_NAMES, None, "nobody"))
    headers = chance.choice((None, {"X-Amzn-Bedrock-Input-Token-Count": chance.choice(("7", "-7", "٧", "", "9" * 30))}))
    readings = []
    for chunk_bytes in (len(body) or 1, chance.randrange(1, 500)):
        meter = Meter(api, provider=provider, content_encoding=coding, headers=headers, status=200)
        for at in range(0, len(body), chunk_bytes):
            meter.feed(body[at : at + chunk_bytes])
        readings.append(meter.finish())
    whole, pieces = readings

    assert whole == pieces
    assert coding is not None or whole.broken is None, whole.broken
    assert " in " not in (whole.broken or ""), whole.broken  # "TypeError in finish": a fault of ours, not of the bytes
    assert whole.usage is None or is_sound(whole.usage), whole.usage
    assert whole.error is None or len(whole.error) <= 64
    json.dumps(whole.text)
    if coding is None:
        read_usage(api or "auto", body, provider=provider, headers=headers, request_body=body[:300])


def test_nothing_that_is_broken_raises_or_is_read_as_nonsense(record_property: Callable[[str, object], None]) -> None:
    for number in range(200):  # what is built once, is
        try_one(random.Random(number))
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(TRIES):
            chance = random.Random(f"{SEED}/{number}")
            try:
                try_one(chance)
            except BaseException as error:
                error.add_note(f"try {number} of LLM_GUARD_FUZZ_SEED={SEED}")
                raise
        gc.collect()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    left = after - before
    said = f"fuzz: {TRIES} broken answers, nothing raised, {left // 1024} kB left behind, peak {peak // 1024} kB"
    record_property("corpus", said)
    assert left < LEFT_BEHIND_BYTES

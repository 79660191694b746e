"""The golden answers: written by us in the shapes that providers send, each with what it has to be read as.

`tests/golden/metering/index.json` says of each file which api and provider it is of, where and when its shape was
read, and the reading that is due.
A field that an entry leaves out has its default: a count that was not said is None.
"""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_guard_mw.metering import Meter, read_usage
from llm_guard_mw.metering.dialects import DIALECTS
from llm_guard_mw.model import Reading, Usage

GOLDEN = Path(__file__).parents[1] / "golden" / "metering"
INDEX: dict[str, dict[str, Any]] = json.loads((GOLDEN / "index.json").read_text())
NAMES = sorted(INDEX)


def body_of(name: str) -> bytes:
    return (GOLDEN / name).read_bytes()


def due_of(name: str) -> Reading:
    entry = INDEX[name]
    usage = None if entry["usage"] is None else Usage(**entry["usage"])
    facts = ("text", "response_id", "service_tier", "error", "free")
    return Reading(usage=usage, ended=entry["ended"], **{fact: entry.get(fact) for fact in facts})


def meter_of(name: str, **more: Any) -> Meter:
    entry = INDEX[name]
    more.setdefault("headers", entry.get("headers"))
    return Meter(entry["api"], provider=entry["provider"], content_type=entry["content_type"], **more)


def read(meter: Meter, *chunks: bytes) -> Reading:
    for chunk in chunks:
        meter.feed(chunk)
    return meter.finish()


def test_every_wire_format_has_a_golden_answer_with_its_source() -> None:
    read = {DIALECTS[entry["api"]] for entry in INDEX.values()}

    assert read == set(DIALECTS.values())
    assert all(entry["source"].startswith("https://") and entry["written"] for entry in INDEX.values())


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_reads_as_due(name: str) -> None:
    assert read(meter_of(name), body_of(name)) == due_of(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_answer_gives_the_same_usage(name: str) -> None:
    entry = INDEX[name]

    usage = read_usage(
        entry["api"],
        body_of(name),
        content_type=entry["content_type"],
        provider=entry["provider"],
        headers=entry.get("headers"),
    )

    assert usage == due_of(name).usage


@pytest.mark.parametrize("api", ["auto", "some.new.api"])
@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_api_is_recognised_by_the_body(name: str, api: str) -> None:
    entry = INDEX[name]

    usage = read_usage(api, body_of(name), provider=entry["provider"], headers=entry.get("headers"))

    assert usage == due_of(name).usage


@pytest.mark.parametrize("name", NAMES)
def test_one_byte_at_a_time_changes_nothing(name: str) -> None:
    body = body_of(name)

    assert read(meter_of(name), *(body[at : at + 1] for at in range(len(body)))) == due_of(name)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), st.lists(st.integers(1, 700), max_size=40), st.booleans())
def test_chunking_never_changes_the_reading(name: str, sizes: list[int], compressed: bool) -> None:
    body = gzip.compress(body_of(name)) if compressed else body_of(name)
    meter = meter_of(name, content_encoding="gzip" if compressed else None)
    for size in sizes:
        meter.feed(body[:size])
        body = body[size:]

    assert read(meter, body) == due_of(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_compressed_answer_reads_the_same(name: str) -> None:
    body = body_of(name)
    bare = zlib.compressobj(wbits=-15)

    assert read(meter_of(name, content_encoding="gzip"), gzip.compress(body)) == due_of(name)
    assert read(meter_of(name, content_encoding="deflate"), zlib.compress(body)) == due_of(name)
    assert read(meter_of(name, content_encoding="deflate"), bare.compress(body) + bare.flush()) == due_of(name)


@pytest.mark.parametrize("name", NAMES)
def test_wherever_an_answer_is_cut_the_meter_stays_calm(name: str) -> None:
    body = body_of(name)
    for end in range(0, len(body), 37):
        reading = read(meter_of(name), body[:end])

        assert reading.broken is None
        assert reading.usage is None or reading.usage.exact or not reading.ended


STREAMS = (".sse", ".ndjson", ".frames")


@pytest.mark.parametrize("name", [name for name in NAMES if INDEX[name]["ended"] and name.endswith(STREAMS)])
def test_a_stream_without_its_second_half_has_not_ended(name: str) -> None:
    body = body_of(name)

    reading = read(meter_of(name), body[: len(body) // 2])

    assert not reading.ended


@pytest.mark.parametrize("name", NAMES)
def test_finishing_twice_says_the_same(name: str) -> None:
    meter = meter_of(name)
    first = read(meter, body_of(name))

    meter.feed(body_of(name))

    assert meter.finish() is first

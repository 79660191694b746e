"""Recorded exchanges of real providers, if they lie beside the checkout (`../shared/corpus`) or at LLM_GUARD_CORPUS.

They are other projects' recordings, so nothing of them is kept here. Which rows differ, and why, is written down in
docs/explanation/metering.md.
"""

import base64
import gzip
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_guard_mw.metering import Meter, identify_api, read_usage
from llm_guard_mw.model import Usage

Row = dict[str, Any]
Property = Callable[[str, object], None]

ROOT = Path(__file__).parents[2]
FIELDS = {
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "cached_input_tokens": "cached_input_tokens",
    "cache_write_tokens": "cache_write_tokens",
    "reasoning_tokens": "reasoning_tokens",
    "audio_input_tokens": "input_audio_tokens",
    "audio_output_tokens": "output_audio_tokens",
}
EQUAL_AT_LEAST = 0.99
DEEP = os.environ.get("LLM_GUARD_HYPOTHESIS") == "deep"
#: How often each stream is cut anew.
SPLITTINGS = 200 if DEEP else 4
#: Gateways that were recorded on hosts of no telling name.
NAMELESS_HOSTS = {
    "local-openai-compatible",
    "mirascope-router",
    "pydantic-gateway",
    "litellm-proxy",
    "gpustack",
    "ollama",
}


@lru_cache
def rows() -> tuple[Row, ...]:
    for folder in (ROOT.parent / "shared" / "corpus", Path(os.environ.get("LLM_GUARD_CORPUS") or ROOT / "no-corpus")):
        files = sorted(folder.glob("*.jsonl.gz"))
        if files:
            return tuple(json.loads(line) for file in files for line in gzip.open(file))
    return ()


@pytest.fixture
def corpus(record_property: Property) -> tuple[Row, ...]:
    if not rows():
        record_property("corpus", "no corpus: neither ../shared/corpus nor LLM_GUARD_CORPUS is there; nothing compared")
        pytest.skip("no corpus beside the checkout (../shared/corpus) and no LLM_GUARD_CORPUS")
    return rows()


def body_of(row: Row) -> bytes:
    body = row["response_body"] or ""
    return base64.b64decode(body) if row["response_body_encoding"] == "base64" else body.encode()


def usage_of(row: Row, api: str, provider: str | None) -> Usage | None:
    return read_usage(
        api,
        body_of(row),
        content_type=row["response_content_type"],
        request_body=json.dumps(row["request_body"]).encode(),
        provider=provider,
        headers=row["response_headers"],
    )


def differences(row: Row, usage: Usage | None) -> str:
    due = row["expected"]
    # Counts that stand in the headers alone are in no usage object.
    silent = due["usage"] is None and due["input_tokens"] is None
    if silent or usage is None:
        return "" if silent == (usage is None) else "usage"
    return " ".join(name for name, column in FIELDS.items() if getattr(usage, name) != due[column])


@pytest.mark.parametrize("named", [True, False], ids=["named", "auto"])
def test_recorded_usage_is_read_as_it_was_sent(corpus: tuple[Row, ...], named: bool, record_property: Property) -> None:
    equal: Counter[str] = Counter()
    different: dict[str, list[str]] = {}
    for row in corpus:
        api = row["api"]
        wrong = differences(row, usage_of(row, api, row["provider"]) if named else usage_of(row, "auto", None))
        if wrong:
            different.setdefault(api, []).append(f"{row['id']} ({wrong})")
        else:
            equal[api] += 1

    for api in sorted({*equal, *different}):
        wrong_rows = different.get(api, [])
        told = f"{api:28} {equal[api]:4} equal {len(wrong_rows):4} different"
        record_property("corpus", f"{'named' if named else 'auto':6}{told}  {', '.join(wrong_rows)}".rstrip())
    total = sum(equal.values()) + sum(map(len, different.values()))
    assert sum(equal.values()) >= EQUAL_AT_LEAST * total, different


def test_the_shape_of_a_body_tells_as_much_as_its_name(corpus: tuple[Row, ...]) -> None:
    for row in corpus:
        named = usage_of(row, row["api"], row["provider"])

        assert usage_of(row, "auto", None) == named, row["id"]
        assert usage_of(row, "some.new.api", "some-new-provider") == named, row["id"]


def test_the_model_is_the_one_that_answered(corpus: tuple[Row, ...]) -> None:
    for row in corpus:
        usage, due = usage_of(row, row["api"], row["provider"]), row["expected"]
        if usage is not None and due["model_source"] in ("response", "request"):
            assert usage.model == due["model"], row["id"]


def test_no_row_of_any_family_raises_or_breaks_the_meter(corpus: tuple[Row, ...]) -> None:
    for row in corpus:
        meter = Meter(row["api"], provider=row["provider"], content_type=row["response_content_type"])
        meter.feed(body_of(row))

        assert meter.finish().broken is None, row["id"]


def test_rows_without_usage_have_none(corpus: tuple[Row, ...]) -> None:
    silent = [row for row in corpus if row["expected"]["usage"] is None and row["expected"]["input_tokens"] is None]

    found = [row["id"] for row in silent if usage_of(row, row["api"], row["provider"]) is not None]

    assert found == []


def test_the_end_of_a_recorded_stream_is_seen(corpus: tuple[Row, ...]) -> None:
    for row in corpus:
        due = row["expected"]["stream_terminated"]
        if due is not None:
            meter = Meter(row["api"], provider=row["provider"])
            meter.feed(body_of(row))

            assert meter.finish().ended == due, row["id"]


def test_what_compaction_and_advisors_used_is_in_the_parts(corpus: tuple[Row, ...]) -> None:
    for row in corpus:
        extra = row["expected"]["extra"]
        if row["api"] != "anthropic.messages" or "iterations_input_total" not in extra:
            continue
        usage = usage_of(row, row["api"], row["provider"])

        assert usage is not None
        assert usage.parts["iterations_input"] == extra["iterations_input_total"], row["id"]
        assert usage.parts["iterations_output"] == extra["iterations_output_total"], row["id"]


def test_a_recorded_request_is_identified(corpus: tuple[Row, ...]) -> None:
    for row in corpus:
        host, slash, path = row["url_path"].partition("/")

        api, provider = identify_api(row["method"], host, slash + path, None)

        assert api == row["api"], row["id"]
        assert provider == row["provider"] or row["provider"] in NAMELESS_HOSTS, row["id"]


def test_every_recorded_stream_reads_the_same_however_it_is_cut(corpus: tuple[Row, ...]) -> None:
    chance = random.Random(20261121)
    for row in corpus:
        if row["framing"] in ("json", "empty"):
            continue
        body = body_of(row)
        whole = Meter(row["api"], provider=row["provider"])
        whole.feed(body)
        for _ in range(SPLITTINGS):
            cuts = sorted(chance.sample(range(len(body) + 1), min(chance.randrange(1, 40), len(body))))
            meter = Meter(row["api"], provider=row["provider"])
            for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True):
                meter.feed(body[start:end])

            assert meter.finish() == whole.finish(), (row["id"], cuts)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_chunking_never_changes_the_reading_of_a_recorded_body(data: st.DataObject) -> None:
    if not rows():
        pytest.skip("no corpus beside the checkout (../shared/corpus) and no LLM_GUARD_CORPUS")
    row = data.draw(st.sampled_from(rows()))
    sizes = data.draw(st.lists(st.integers(1, 5000), max_size=30))
    compressed = data.draw(st.booleans())
    body = body_of(row)
    whole = Meter(row["api"], provider=row["provider"])
    whole.feed(body)
    meter = Meter(row["api"], provider=row["provider"], content_encoding="gzip" if compressed else None)
    rest = gzip.compress(body) if compressed else body
    for size in sizes:
        meter.feed(rest[:size])
        rest = rest[size:]
    meter.feed(rest)

    assert meter.finish() == whole.finish()

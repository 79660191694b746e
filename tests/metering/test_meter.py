"""What the meter does with bytes that no provider would send, or not in this way."""

import gzip
import io
import json
import random
import sys
import time
import tracemalloc
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_guard_mw.metering import Meter, decoding, read_usage
from llm_guard_mw.metering.dialects import DIALECTS
from llm_guard_mw.metering.kept import HEAD_BYTES, TAIL_BYTES
from llm_guard_mw.model import Reading, Usage

MIB = 1024 * 1024


def read(body: bytes, api: str | None = "openai.chat", *, chunk_bytes: int = 0, **more: object) -> Reading:
    meter = Meter(api, **more)  # type: ignore[arg-type]
    for at in range(0, len(body), chunk_bytes or len(body) or 1):
        meter.feed(body[at : at + (chunk_bytes or len(body))])
    return meter.finish()


def chat(usage: object, content: str = "four") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    doc = {"id": "c-1", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}
    return json.dumps(doc).encode()


def event(doc: object) -> bytes:
    return b"data: " + json.dumps(doc).encode() + b"\n\n"


def delta(content: str) -> bytes:
    return event(
        {"id": "c-1", "object": "chat.completion.chunk", "model": "m", "choices": [{"delta": {"content": content}}]}
    )


def usage_chunk(prompt: int, completion: int) -> bytes:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return event({"id": "c-1", "object": "chat.completion.chunk", "model": "m", "choices": [], "usage": usage})


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("said", "taken"),
    [
        (7, 7),
        (0, 0),
        (7.0, 7),
        (2**53, 2**53),
        (2**53 + 2, None),
        (10**30, None),
        (-1, None),
        (7.5, None),
        (1e300, None),
        ("7", None),
        (True, None),
        (None, None),
        ([7], None),
        ({"tokens": 7}, None),
    ],
)
def test_a_count_is_a_whole_number_that_is_not_negative(said: object, taken: int | None) -> None:
    usage = read(chat({"prompt_tokens": 1, "completion_tokens": said})).usage

    assert usage is not None
    assert usage.output_tokens == taken


def test_a_number_of_ten_thousand_digits_is_no_count() -> None:
    body = chat({"prompt_tokens": 1, "completion_tokens": 4711}).replace(b"4711", b"9" * 10_000)

    reading = read(body)

    assert reading.broken is None
    assert reading.usage is None or reading.usage.output_tokens is None


def test_a_sum_that_leaves_the_exact_range_was_not_said() -> None:
    usage = {"input_tokens": 2**53, "cache_read_input_tokens": 2**53, "output_tokens": 1}

    found = read_usage("anthropic.messages", json.dumps({"type": "message", "content": [], "usage": usage}).encode())

    assert found is not None
    assert found.input_tokens is None


@pytest.mark.parametrize(
    "usage", [None, {}, [], "7", 7, {"prompt_tokens": None}, {"cost": 0.2}, {"prompt_tokens": "x"}]
)
def test_a_usage_object_that_says_nothing_is_no_usage(usage: object) -> None:
    assert read(chat(usage)).usage is None


def test_the_last_of_duplicate_keys_counts() -> None:
    body = (
        b'{"object":"chat.completion","choices":[],"usage":{"prompt_tokens":1,"prompt_tokens":3,"completion_tokens":2}}'
    )

    assert read(body).usage == Usage(input_tokens=3, output_tokens=2)


# ---------------------------------------------------------------- providers that count otherwise


def test_reasoning_beside_the_completion_is_proved_by_the_total_whoever_serves_it() -> None:
    body = chat(
        {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "total_tokens": 35,
            "completion_tokens_details": {"reasoning_tokens": 20},
        }
    )

    for provider in ("azure", "xai", None):
        usage = read(body, provider=provider).usage
        assert usage is not None
        assert usage.output_tokens == 25


def test_reasoning_within_the_completion_is_not_added_again() -> None:
    body = chat(
        {
            "prompt_tokens": 10,
            "completion_tokens": 25,
            "total_tokens": 35,
            "completion_tokens_details": {"reasoning_tokens": 20},
        }
    )

    for provider in ("openai", "xai", "azure", None):
        usage = read(body, provider=provider).usage
        assert usage is not None
        assert usage.output_tokens == 25


def test_a_cache_beside_the_prompt_is_proved_by_the_total() -> None:
    body = chat(
        {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "total_tokens": 445,
            "cache_read_input_tokens": 400,
            "cache_creation_input_tokens": 30,
        }
    )

    usage = read(body, provider="portkey").usage

    assert usage == Usage(input_tokens=440, output_tokens=5, cached_input_tokens=400, cache_write_tokens=30, model="m")


def test_what_the_total_leaves_is_reasoning_though_as_much_was_cached() -> None:
    body = chat(
        {
            "prompt_tokens": 300,
            "completion_tokens": 5,
            "total_tokens": 561,
            "prompt_tokens_details": {"cached_tokens": 256},
            "completion_tokens_details": {"reasoning_tokens": 256},
        }
    )

    usage = read(body, provider="xai").usage

    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens) == (300, 261)


def test_a_usage_that_stands_in_a_choice_is_read() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    choice = {"index": 0, "delta": {}, "finish_reason": "stop", "usage": usage}
    body = delta("four") + event({"object": "chat.completion.chunk", "model": "m", "choices": [choice]})

    assert read(body, provider="moonshot").usage == Usage(input_tokens=3, output_tokens=4, model="m")


def test_a_provider_that_nobody_knows_may_serve_any_shape() -> None:
    body = b"""{"object":"chat.completion","model":"google/gemini-2.5-pro","choices":[],
               "usage":{"prompt_tokens":10,"completion_tokens":5,"total_tokens":40}}"""

    usage = read(body, provider="our-own-gateway").usage

    assert usage is not None
    assert (usage.output_tokens, usage.reasoning_tokens) == (30, 25)


def test_gemini_is_another_name_of_google() -> None:
    body = chat({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 40})

    assert read_usage("openai.chat", body, provider="gemini") == read_usage("openai.chat", body, provider="google")
    assert read_usage("openai.chat", body, provider="openai") != read_usage("openai.chat", body, provider="google")


def test_the_model_of_the_request_stands_in_where_the_answer_names_none() -> None:
    body = b'{"object":"list","data":[{"embedding":[]}],"usage":{"prompt_tokens":3,"total_tokens":3}}'

    usage = read_usage("openai.embeddings", body, request_body=b'{"model":"e-5","input":"x"}')

    assert usage is not None
    assert usage.model == "e-5"


# ---------------------------------------------------------------- size


def long_stream(megabytes: int) -> Iterator[bytes]:
    yield delta("start ")
    for _ in range(megabytes * 16):
        yield delta("x" * 65_536)
    yield delta("end")
    yield usage_chunk(3, 1_000_000)
    yield b"data: [DONE]\n\n"


def test_a_long_stream_is_read_to_its_end_in_bounded_memory() -> None:
    meter = Meter("openai.chat")
    tracemalloc.start()
    try:
        for chunk in long_stream(16):
            meter.feed(chunk)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    reading = meter.finish()

    assert reading.usage == Usage(input_tokens=3, output_tokens=1_000_000, model="m")
    assert reading.ended
    assert peak < HEAD_BYTES + 2 * TAIL_BYTES + 2 * MIB


def test_text_of_which_the_middle_was_lost_is_not_said_to_be_all() -> None:
    body = delta("x" * 2 * MIB) + delta("end") + b"data: [DONE]\n\n"

    reading = read(body, chunk_bytes=7919)

    assert reading.usage is None
    assert not reading.ended


def test_a_body_larger_than_what_is_kept_is_read_from_its_end() -> None:
    rows = [{"object": "embedding", "index": n, "embedding": [0.123456789] * 1536} for n in range(100)]
    doc = {"object": "list", "data": rows, "model": "e", "usage": {"prompt_tokens": 800, "total_tokens": 800}}

    reading = read(json.dumps(doc).encode(), "openai.embeddings", chunk_bytes=16_384)

    assert reading.usage == Usage(input_tokens=800)
    assert reading.ended


def test_a_last_event_larger_than_what_is_kept_is_read_from_its_end() -> None:
    response = {
        "id": "r-1",
        "object": "response",
        "status": "completed",
        "output": [{"type": "image_generation_call", "result": "A" * 2 * MIB}],
        "usage": {"input_tokens": 5, "output_tokens": 6, "total_tokens": 11},
        "metadata": {},
    }
    body = event({"type": "response.created", "response": {"id": "r-1", "model": "m", "status": "in_progress"}})
    body += event({"type": "response.completed", "response": response})

    reading = read(body, "openai.responses", chunk_bytes=16_384)

    assert reading.usage == Usage(input_tokens=5, output_tokens=6, model="m")


def test_only_closing_brackets_may_follow_a_usage_that_is_read_from_the_end() -> None:
    said = {"prompt_tokens": 1, "completion_tokens": 1}
    doc = {"padding": "x" * 2 * MIB, "echo": {"usage": said}, "more": "of the document"}

    assert read(json.dumps(doc).encode(), None).usage is None


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3 * TAIL_BYTES), st.lists(st.integers(1, 400_000), max_size=12), st.booleans())
def test_chunking_never_changes_the_reading_of_a_large_answer(over: int, sizes: list[int], as_json: bool) -> None:
    content = "word " * ((HEAD_BYTES - TAIL_BYTES + over) // 5)
    body = (
        chat({"prompt_tokens": 3, "completion_tokens": 4}, content) if as_json else delta(content) + usage_chunk(3, 4)
    )
    meter = Meter("openai.chat")
    rest = body
    for size in sizes:
        meter.feed(rest[:size])
        rest = rest[size:]
    meter.feed(rest)

    assert meter.finish() == read(body)


# ---------------------------------------------------------------- codings


def test_a_gzip_bomb_is_given_up() -> None:
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb") as file:
        for _ in range(256):
            file.write(b" " * MIB)
    bomb = buffer.getvalue()
    meter = Meter("openai.chat", content_encoding="gzip")

    tracemalloc.start()
    try:
        meter.feed(bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    reading = meter.finish()
    assert reading.broken is not None
    assert "inflates" in reading.broken
    assert reading.usage is None
    assert peak < 4 * MIB


def test_damaged_gzip_breaks_the_meter_and_nothing_else() -> None:
    body = bytearray(gzip.compress(random.Random(1).randbytes(2000)))
    body[900:1000] = bytes(100)

    reading = read(bytes(body), content_encoding="gzip")

    assert reading.broken is not None
    assert reading.broken.startswith("gzip")


def test_a_stream_cut_within_its_gzip_is_read_as_far_as_it_came() -> None:
    packer = zlib.compressobj(wbits=31)
    packed = packer.compress(delta("half of it")) + packer.flush(zlib.Z_SYNC_FLUSH)

    reading = read(packed, content_encoding="gzip")

    assert reading.text == "half of it"
    assert not reading.ended


def test_gzip_of_several_members_is_one_body() -> None:
    packed = gzip.compress(delta("four")) + gzip.compress(usage_chunk(3, 1)) + bytes(64)

    assert read(packed, content_encoding="gzip", chunk_bytes=5).usage == Usage(
        input_tokens=3, output_tokens=1, model="m"
    )


def test_a_body_that_is_not_in_the_coding_it_names_is_taken_as_it_is() -> None:
    body = chat({"prompt_tokens": 3, "completion_tokens": 1})

    for coding in ("gzip", "x-gzip", "deflate", "identity", "br", "zstd", ""):
        assert read(body, content_encoding=coding).usage == Usage(input_tokens=3, output_tokens=1, model="m")


def test_gzip_that_nobody_declared_is_found_by_its_first_bytes() -> None:
    body = gzip.compress(chat({"prompt_tokens": 3, "completion_tokens": 1}))

    assert read_usage("openai.chat", body) == Usage(input_tokens=3, output_tokens=1, model="m")


def test_the_content_encoding_is_found_in_the_headers() -> None:
    body = gzip.compress(chat({"prompt_tokens": 3, "completion_tokens": 1}))

    assert read(body, headers={"Content-Encoding": "GZIP"}).usage == Usage(input_tokens=3, output_tokens=1, model="m")


def test_an_unknown_coding_breaks_the_meter_and_says_its_name() -> None:
    reading = read(b"\x00\x01\x02\x03\x04", content_encoding="compress, gzip")

    assert reading == Reading(broken="compress, gzip: not a coding that is read here")


def test_br_is_read_where_a_decoder_is_installed() -> None:
    brotli = pytest.importorskip("brotli")
    body = delta("x" * 100_000) + usage_chunk(3, 1)

    reading = read(brotli.compress(body), content_encoding="br", chunk_bytes=11)

    assert reading.usage == Usage(input_tokens=3, output_tokens=1, model="m")


def test_a_br_bomb_is_given_up() -> None:
    brotli = pytest.importorskip("brotli")

    reading = read(brotli.compress(b" " * 256 * MIB, quality=1), content_encoding="br")

    assert "inflates" in (reading.broken or "")


def zstd_of(body: bytes) -> bytes:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.compress(body)
    try:
        from backports import zstd
    except ImportError:
        return pytest.importorskip("zstandard").ZstdCompressor().compress(body)  # type: ignore[no-any-return]
    return zstd.compress(body)  # type: ignore[no-any-return]


def test_zstd_is_read_where_a_decoder_is_installed() -> None:
    body = zstd_of(delta("x" * 100_000) + usage_chunk(3, 1))

    reading = read(body, content_encoding="zstd", chunk_bytes=11)

    assert reading.usage == Usage(input_tokens=3, output_tokens=1, model="m")


def test_zstd_is_read_with_the_decoder_that_has_no_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    zstandard = pytest.importorskip("zstandard")
    monkeypatch.setattr(decoding, "_installed", lambda name: zstandard if name == "zstandard" else None)
    body = zstandard.ZstdCompressor().compress(delta("x" * 100_000) + usage_chunk(3, 1))
    bomb = zstandard.ZstdCompressor().compress(b" " * 256 * MIB)

    assert read(body, content_encoding="zstd", chunk_bytes=11).usage == Usage(
        input_tokens=3, output_tokens=1, model="m"
    )
    assert "inflates" in (read(bomb, content_encoding="zstd").broken or "")


@pytest.mark.parametrize(("coding", "magic"), [("br", b"\x8b\x02\x80"), ("zstd", b"\x28\xb5\x2f\xfd")])
def test_a_coding_without_a_decoder_is_named(coding: str, magic: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_installed", lambda name: None)

    reading = read(magic + bytes(100), content_encoding=coding)

    assert (reading.broken or "").startswith(f"{coding}: no decoder is installed")


def test_a_zstd_bomb_is_given_up() -> None:
    reading = read(zstd_of(b" " * 256 * MIB), content_encoding="zstd")

    assert "inflates" in (reading.broken or "")


# ---------------------------------------------------------------- hostile bodies


ONE_OF_EACH = {dialect: api for api, dialect in DIALECTS.items()}.values()
HOSTILE = {
    "spaces": b" " * MIB,
    "spaces within": b'{"usage":' + b" " * MIB,
    "newlines": b"data: x" + b"\n" * MIB,
    "nesting": b'{"usage":' + b"[" * 2000 + b"]" * 2000 + b"}",
    "nesting without end": b"[" * MIB,
    "objects": b"{}" * (MIB // 2),
    "numbers": b"1 " * (MIB // 2),
    "empty data lines": b"data:\n" * (MIB // 6),
    "empty events": b"data:\n\n" * (MIB // 7),
    "comments": b":\n\n" * (MIB // 3),
    "open usages": b'{"usage": {' * (MIB // 11),
    "open usages in events": b'data: {"usage": {\n\n' * (MIB // 18),
    "errors in events": b'data: {"error": {"code": "x"}}\n\n' * (MIB // 31),
    "backslashes": b'{"' + b"\\" * MIB,
    "no utf-8": b'{"model": "' + b"\xff" * MIB + b'"}',
    "nul": bytes(MIB),
    "lines of nothing": b"{}\n" * (MIB // 3),
    "lines that never close": b"{}\n" + b"{\n" * (MIB // 2),
    "lines that are not done": b'{"done":false,"response":""}\n' * (MIB // 29),
    "an array of objects": b"[" + b"{}," * (MIB // 3) + b"{}]",
    "an array in a usage": b'{"usage":{"iterations":[' + b"{}," * (MIB // 3) + b"{}]}}",
    "a usage of many members": b'{"usage":{' + b",".join(b'"%d":"x"' % n for n in range(MIB // 12)) + b"}}",
    "one key again and again": b'{"usage":{' + b'"prompt_tokens":"x",' * (MIB // 20) + b'"a":""}}',
    "digits": b'{"usage":{"prompt_tokens":' + b"9" * MIB + b"}}",
    "fractions": b'{"usage":{"prompt_tokens":0.' + b"9" * MIB + b"e-9}}",
    "results of results": b'{"results":[' + b'{"generated_token_count":"x"},' * (MIB // 30) + b"{}]}",
    "predictions": b'{"predictions":[' + b'{"embeddings":{}},' * (MIB // 18) + b"{}]}",
    "last members": b'{"total_duration":' * (MIB // 18),
    "carriage returns": b"data: x" + b"\r" * MIB,
}


@pytest.mark.parametrize(
    "api", ["openai.chat", "anthropic.messages", "gemini.generate", "ollama.chat", "watsonx.generation", "auto"]
)
@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_body_costs_no_more_than_its_length(body: bytes, api: str) -> None:
    began = time.process_time()

    reading = read(body, api, chunk_bytes=8192)

    assert reading.broken is None
    assert reading.usage is None or reading.usage.input_tokens is None
    assert time.process_time() - began < 5.0  # many times what it takes; squares would be hours


def test_a_usage_behind_deep_nesting_is_found() -> None:
    body = b'{"deep":' + b"[" * 2000 + b"]" * 2000 + b',"usage":{"prompt_tokens":3,"completion_tokens":1}}'

    assert read(body).usage == Usage(input_tokens=3, output_tokens=1)


MEMBERS = [
    *("type", "object", "id", "model", "usage", "choices", "message", "delta", "content", "text", "error", "data"),
    *("response", "output", "status", "candidates", "parts", "usageMetadata", "promptTokenCount", "prompt_tokens"),
    *("input_tokens", "output_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details", "iterations"),
    *("completion_tokens_details", "cache_creation", "server_tool_use", "x_groq", "embedding", "finish_reason"),
    *("finishReason", "tool_calls", "function", "action", "item", "content_block", "input", "promptFeedback"),
    *sorted({member for dialect in DIALECTS.values() for member in dialect.members}),
    *(
        "billed_units",
        "tokens",
        "cached_tokens",
        "inputTokens",
        "outputTokens",
        "cacheDetails",
        "ttl",
        "serverToolUsage",
    ),
    *("total_input_tokens", "total_tool_use_tokens", "grounding_tool_count", "promptTokensDetails", "modality"),
    *("embeddings", "statistics", "token_count", "tokenMetadata", "pages_processed", "stop_reason", "connectors"),
    *("prompt_eval_count", "eval_count", "input_token_count", "generated_token_count", "event_type", "interaction"),
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(MEMBERS), inner, max_size=6),
    max_leaves=25,
)
kinds = st.sampled_from(
    [
        *(
            "message_start",
            "message_delta",
            "message",
            "response.completed",
            "response.output_text.delta",
            "error",
            "x",
        ),
        *(
            "message-end",
            "content-delta",
            "transcript.text.done",
            "image_generation.completed",
            "conversation.response.done",
        ),
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from(["type"]), kinds, max_size=1), min_size=1, max_size=3),
    json_values,
    st.sampled_from([*ONE_OF_EACH, "auto"]),
    st.sampled_from(["events", "lines", "array", "document"]),
)
def test_values_of_any_type_anywhere_neither_raise_nor_break(
    heads: list[dict[str, str]], value: object, api: str, framing: str
) -> None:
    docs = [
        {**head, **value} if isinstance(value, dict) else {**head, "usage": value, "choices": value} for head in heads
    ]
    body = {
        "events": b"".join(map(event, docs)),
        "lines": b"\n".join(json.dumps(doc).encode() for doc in docs),
        "array": json.dumps(docs).encode(),
        "document": json.dumps(docs[0]).encode(),
    }[framing]

    reading = read(body, api)

    assert reading.broken is None


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_bytes_of_any_kind_neither_raise_nor_break(body: bytes) -> None:
    assert read(body, "auto").usage is None
    read(body, "auto", content_encoding="gzip")


def test_what_is_no_bytes_breaks_the_meter_and_not_the_caller() -> None:
    meter = Meter("openai.chat")

    meter.feed("text")  # type: ignore[arg-type]

    assert meter.finish().broken == "TypeError in feed"


# ---------------------------------------------------------------- answers of the app's own


def test_a_page_is_counted_from_its_text() -> None:
    reading = read("<p>Größe</p>".encode(), None, content_type="text/html; charset=utf-8")

    assert reading == Reading(text="<p>Größe</p>", ended=True)


def test_json_of_no_provider_is_counted_whole() -> None:
    reading = read(b'{"answer": "at four", "took": 3}', None, content_type="application/json")

    assert reading == Reading(text='{"answer": "at four", "took": 3}', ended=True)


def test_an_apps_answer_with_a_framework_s_usage_is_read() -> None:
    body = b'{"text": "At four.", "usage": {"inputTokens": 10, "outputTokens": 5, "totalTokens": 15}}'

    assert read(body, None).usage == Usage(input_tokens=10, output_tokens=5)


@pytest.mark.parametrize(
    "doc",
    [
        {"done": True, "message": "Your order was saved."},
        {"predictions": ["rain", "wind"]},
        {"answer": "At four.", "input_tokens": 5},
        {"text": "At four.", "usage": {"seats": 3}},
        {"results": [{"title": "Tides"}], "meta": {"api_version": "2"}},
        {"usage": {"help": "ask for the tides"}, "object": "page"},
        {"data": [{"url": "https://shop.example/1", "name": "A map of tides"}]},
    ],
)
def test_an_apps_own_body_that_looks_like_a_providers_is_counted_as_it_is(doc: object) -> None:
    body = json.dumps(doc).encode()

    reading = read(body, None)

    assert reading.usage is None
    assert reading.text == body.decode()


def test_a_stream_of_no_provider_is_counted_from_its_data() -> None:
    reading = read(b"data: at \n\ndata: four\n\n", None, content_type="text/event-stream")

    assert reading == Reading(text="at four", ended=True)


def test_a_page_where_a_providers_answer_was_due_has_not_ended() -> None:
    reading = read(b"<p>four</p>", "openai.chat", content_type="text/html")

    assert reading == Reading(text="<p>four</p>")


def test_a_page_of_which_the_middle_was_lost_has_not_ended() -> None:
    assert not read(b"x" * 2 * MIB, None, content_type="text/plain").ended


def test_json_of_no_provider_that_was_cut_has_not_ended() -> None:
    assert read(b'{"answer": "at fo', None) == Reading(text='{"answer": "at fo')


@pytest.mark.parametrize("content_type", ["image/png", "audio/mpeg", "application/octet-stream", "application/pdf"])
def test_binary_answers_have_no_text(content_type: str) -> None:
    assert read(b"abcdef", None, content_type=content_type).text is None


def test_bytes_that_are_no_text_have_no_text_whatever_they_are_called() -> None:
    assert read(b"\x89PNG\r\n\x1a\n\x00\x00", None).text is None
    assert read(b"abc\xff\xfedef" * 9, None).text is None


def test_an_error_answer_has_no_text_to_be_charged() -> None:
    body = json.dumps({"error": {"message": "no", "type": "invalid_request_error", "code": None}}).encode()

    reading = read(body, "openai.chat", status=400)

    assert reading == Reading(ended=True, error="invalid_request_error")


def test_an_error_is_named_by_its_code_and_never_by_its_message() -> None:
    body = json.dumps({"error": {"message": "you wrote: my secret", "code": "my secret is long"}}).encode()

    assert read(body).error == "error"


def test_an_empty_answer_is_empty_text() -> None:
    assert Meter("openai.chat").finish() == Reading(text="")

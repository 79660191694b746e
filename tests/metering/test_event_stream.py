"""Amazon's frames: a frame counts only with both of its checksums, and the end is found where the middle is lost."""

import base64
import json
import struct
import time
import zlib

from hypothesis import given, settings
from hypothesis import strategies as st

from llm_guard_mw.metering import Meter
from llm_guard_mw.metering.kept import HEAD_BYTES
from llm_guard_mw.model import Reading, Usage

MIB = 1024 * 1024


def header(name: str, kind: int, value: bytes) -> bytes:
    return bytes([len(name)]) + name.encode() + bytes([kind]) + value


def text(value: str) -> bytes:
    return struct.pack(">H", len(value)) + value.encode()


def framed(headers: bytes, payload: bytes) -> bytes:
    prelude = struct.pack(">II", 16 + len(headers) + len(payload), len(headers))
    message = prelude + struct.pack(">I", zlib.crc32(prelude)) + headers + payload
    return message + struct.pack(">I", zlib.crc32(message))


def event(kind: str, doc: object, *, before: bytes = b"") -> bytes:
    headers = header(":event-type", 7, text(kind)) + header(":message-type", 7, text("event"))
    return framed(before + headers, json.dumps(doc).encode())


def delta(content: str) -> bytes:
    return event("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": content}})


def metadata(asked: int, wrote: int) -> bytes:
    return event("metadata", {"usage": {"inputTokens": asked, "outputTokens": wrote, "totalTokens": asked + wrote}})


def chunk(doc: object) -> bytes:
    return event("chunk", {"bytes": base64.b64encode(json.dumps(doc).encode()).decode()})


def read(body: bytes, api: str = "bedrock.converse", *, chunk_bytes: int = 8192) -> Reading:
    meter = Meter(api, provider="bedrock")
    for at in range(0, len(body), chunk_bytes):
        meter.feed(body[at : at + chunk_bytes])
    return meter.finish()


STOP = event("messageStop", {"stopReason": "end_turn"})


def test_headers_of_every_type_may_stand_before_those_that_are_read() -> None:
    before = b"".join(
        (
            header(":yes", 0, b""),
            header(":no", 1, b""),
            header(":byte", 2, b"\x01"),
            header(":short", 3, bytes(2)),
            header(":int", 4, bytes(4)),
            header(":long", 5, bytes(8)),
            header(":bytes", 6, struct.pack(">H", 3) + b"abc"),
            header(":time", 8, bytes(8)),
            header(":uuid", 9, bytes(16)),
        )
    )
    usage = {"usage": {"inputTokens": 3, "outputTokens": 4}}

    assert read(STOP + event("metadata", usage, before=before)).usage == Usage(input_tokens=3, output_tokens=4)


def test_a_frame_with_a_wrong_checksum_says_nothing() -> None:
    good = delta("four") + STOP + metadata(3, 4)
    for at in range(len(good) - len(metadata(3, 4)), len(good)):
        damaged = bytearray(good)
        damaged[at] ^= 0x10

        reading = read(bytes(damaged))

        assert reading.usage is None, at
        assert reading.broken is None, at


def test_frames_behind_a_damaged_one_are_read() -> None:
    damaged = bytearray(delta("lost"))
    damaged[9] ^= 1  # its prelude, so that not even its length is known

    reading = read(delta("The tide ") + bytes(damaged) + STOP + metadata(3, 4))

    assert reading.usage == Usage(input_tokens=3, output_tokens=4)


def test_the_end_of_a_long_stream_is_read_though_its_middle_is_not_kept() -> None:
    body = event("messageStart", {"role": "assistant"}) + delta("x" * 900) * 3000 + STOP + metadata(3, 4)
    assert len(body) > 2 * HEAD_BYTES

    reading = read(body)

    assert reading.usage == Usage(input_tokens=3, output_tokens=4)
    assert reading.ended


def test_a_long_stream_of_invoked_models_is_read_from_its_ends() -> None:
    start = {"type": "message_start", "message": {"id": "m", "model": "c", "usage": {"input_tokens": 5}}}
    block = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "x" * 900}}
    body = chunk(start) + chunk(block) * 2000 + chunk({"type": "message_delta", "usage": {"output_tokens": 7}})
    body += chunk({"type": "message_stop"})

    reading = read(body, "bedrock.invoke")

    assert reading.usage == Usage(input_tokens=5, output_tokens=7, model="c")


def test_an_exception_says_its_name_and_never_its_message() -> None:
    headers = header(":exception-type", 7, text("throttlingException")) + header(":message-type", 7, text("exception"))
    body = delta("The tide ") + framed(headers, b'{"message": "too many of: tell me a secret"}')

    reading = read(body)

    assert reading.error == "throttlingException"
    assert reading.text == "The tide "
    assert not reading.ended


def test_an_error_says_its_code() -> None:
    headers = header(":error-code", 7, text("internalError")) + header(":message-type", 7, text("error"))

    assert read(delta("x") + framed(headers, b"")).error == "internalError"


LARGEST = struct.pack(">II", 24 * MIB, 0)
HOSTILE = {
    "preludes": framed(b"", b"")[:12] * (MIB // 12),
    "empty frames": framed(b"", b"") * (MIB // 16),
    "headers that never come": framed(b"", b"") + b"\x0b:event-type" * (MIB // 12),
    "a frame of the largest size": (prelude := struct.pack(">II", 24 * MIB, 0))
    + struct.pack(">I", zlib.crc32(prelude)),
    "headers longer than themselves": framed(b"\xff:" * 500, b"{}") * (MIB // 1020),
    "base64 that is none": event("chunk", {"bytes": "é" * 1000}) * 500,
    "chunks within chunks": chunk({"bytes": "e30="}) * 5000,
    "deep payloads": framed(header(":event-type", 7, text("x")), b"[" * 2000 + b"]" * 2000) * 100,
}


def test_hostile_frames_cost_no_more_than_their_length() -> None:
    for name, body in HOSTILE.items():
        began = time.process_time()

        reading = read(body, "auto")

        assert reading.broken is None, name
        assert reading.usage is None, name
        assert time.process_time() - began < 5.0, name


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=200), st.integers(0, 300), st.integers(0, 255))
def test_frames_of_any_content_damaged_anywhere_neither_raise_nor_break(
    headers: bytes, payload: bytes, at: int, flip: int
) -> None:
    body = bytearray(framed(headers, payload) + metadata(1, 2))
    body[at % len(body)] ^= flip

    assert read(bytes(body), "auto").broken is None

"""A stored response repeats its usage each time it is fetched: the live meter counts it once."""

import json

from llm_guard_mw.metering import BilledResponses, Meter, read_usage
from llm_guard_mw.model import Reading, Usage

USAGE = {"input_tokens": 5, "output_tokens": 6, "total_tokens": 11}
COUNTED = Usage(input_tokens=5, output_tokens=6)


def response(status: str = "completed", *, background: bool = False, response_id: str = "resp_1") -> bytes:
    usage = USAGE if status == "completed" else None
    doc = {"id": response_id, "object": "response", "status": status, "background": background, "usage": usage}
    return json.dumps(doc).encode()


def read(body: bytes, billed: BilledResponses, *, fetched: bool = True, provider: str | None = "openai") -> Reading:
    meter = Meter("openai.responses.retrieve" if fetched else "openai.responses", provider=provider, billed=billed)
    meter.feed(body)
    return meter.finish()


def test_a_response_that_is_fetched_again_costs_nothing() -> None:
    billed = BilledResponses()

    made = read(response(), billed, fetched=False)
    again = read(response(), billed)

    assert made.usage == COUNTED
    assert (again.usage, again.free, again.response_id) == (None, "repeated", "resp_1")


def test_making_a_response_counts_whatever_its_id() -> None:
    billed = BilledResponses()  # a server in a test may well give each response the same one

    assert [read(response(), billed, fetched=False).usage for _ in range(2)] == [COUNTED, COUNTED]


def test_a_response_made_elsewhere_costs_nothing_to_fetch() -> None:
    assert read(response(), BilledResponses()).free == "repeated"


def test_a_background_response_made_elsewhere_is_counted_when_it_is_done_and_once() -> None:
    billed = BilledResponses()

    polls = [read(response(status, background=True), billed) for status in ("in_progress", "completed", "completed")]

    assert [poll.usage for poll in polls] == [None, COUNTED, None]
    assert [poll.free for poll in polls] == ["repeated", None, "repeated"]


def test_a_background_response_whose_hold_was_booked_is_not_counted_as_well() -> None:
    billed = BilledResponses()

    made = read(response("queued", background=True), billed, fetched=False)
    done = read(response(background=True), billed)

    assert (made.usage, made.ended, made.free) == (None, False, None)
    assert (done.usage, done.free) == (None, "repeated")


def test_a_door_that_does_not_know_the_provider_knows_the_response() -> None:
    billed = BilledResponses()
    read(response("queued", background=True), billed, fetched=False)

    assert read(response(background=True), billed, provider=None).free == "repeated"


def test_another_providers_response_is_another_one() -> None:
    billed = BilledResponses()
    read(response("queued", background=True), billed, fetched=False)

    assert read(response(background=True), billed, provider="azure").usage == COUNTED


def test_what_a_fetch_says_is_read_all_the_same() -> None:
    assert read_usage("openai.responses.retrieve", response()) == COUNTED


def test_only_so_many_responses_are_remembered() -> None:
    billed = BilledResponses(known_max=100)
    for number in range(1000):
        billed.note("openai", f"resp_{number}")

    assert not billed.holds("openai", "resp_899")
    assert billed.holds("openai", "resp_900")


def test_an_interaction_is_known_as_well() -> None:
    billed = BilledResponses()
    usage = {"total_input_tokens": 5, "total_output_tokens": 6, "total_tokens": 11}
    doc = {"id": "v1_1", "object": "interaction", "status": "completed", "usage": usage}
    for api, free in (("gemini.interactions", None), ("gemini.interactions.retrieve", "repeated")):
        meter = Meter(api, provider="google", billed=billed)
        meter.feed(json.dumps(doc).encode())

        assert meter.finish().free == free


def test_a_chat_completion_that_was_stored_costs_nothing_to_fetch() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    doc = {"id": "chatcmpl-1", "object": "chat.completion", "model": "m", "choices": [], "usage": usage}
    meter = Meter("openai.chat.stored", provider="openai", billed=BilledResponses())
    meter.feed(json.dumps(doc).encode())

    assert meter.finish().free == "repeated"

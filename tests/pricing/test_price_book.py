"""The price book: exact costs, upper bounds, and what becomes of models that nobody priced."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Context, Decimal, getcontext, localcontext

import pytest
from genai_prices import data_snapshot
from genai_prices.data import providers
from genai_prices.types import ModelInfo, Provider
from genai_prices.types import Usage as Counted
from hypothesis import given
from hypothesis import strategies as st

from llm_guard_mw.errors import GuardError
from llm_guard_mw.model import Usage
from llm_guard_mw.pricing import (
    MODEL_NAME_MAX,
    ModelPrice,
    PriceBook,
    PriceRules,
    Unpriced,
    limits_of,
)

AT = 1_795_220_000_000  # 21 November 2026
TIERS = (None, "default", "flex", "priority", "fast")


@pytest.fixture(scope="module")
def book() -> PriceBook:
    return PriceBook(clock=lambda: AT)


def _own_models(book: PriceBook) -> Iterator[tuple[Provider, ModelInfo]]:
    """All listed models whose id leads back to themselves."""
    for provider in providers:
        for model in provider.models:
            found = book._find(provider.id, model.id)
            if found is not None and found[1] is model:
                yield provider, model


def _theirs(model: ModelInfo, provider: Provider, context: dict[str, str] | None, **counts: int) -> int:
    """The same question to `genai-prices`, in nano-dollars. It refuses to infer what is not said to be 0."""
    silent = dict.fromkeys(
        ("cache_audio_read_tokens", "cache_image_read_tokens", "cache_audio_write_tokens", "input_image_tokens"), 0
    )
    with localcontext(Context(prec=60)):
        price = model.calc_price(
            Counted(**(silent | {"input_audio_tokens": 0} | counts)),
            provider,
            genai_request_timestamp=datetime.fromtimestamp(AT / 1000, UTC),
            price_context=context,
        )
        return int((price.total_price * 10**9).quantize(Decimal(1), ROUND_HALF_EVEN))


# ---------------------------------------------------------------- the cost of usage


def test_cost_agrees_with_genai_prices_for_every_listed_model(book: PriceBook) -> None:
    chance = random.Random(20261121)
    thresholds = (100_000, 128_000, 200_000, 272_000)
    compared = 0

    for provider, model in _own_models(book):
        tier = chance.choice(TIERS)
        batch = chance.random() < 0.2
        total = chance.choice((chance.randrange(3_000), chance.choice(thresholds) + chance.randrange(2)))
        cached = chance.randrange(total + 1)
        written = chance.randrange(total - cached + 1)
        for_an_hour = chance.randrange(written + 1)
        out = chance.randrange(40_000)
        usage = Usage(
            input_tokens=total,
            output_tokens=out,
            cached_input_tokens=cached,
            cache_write_tokens=written,
            parts={"cache_write_1h": for_an_hour, "cache_write_5m": written - for_an_hour},
        )
        context = {"processing": "batch"} if batch else {"service_tier": tier} if tier else None
        if context and tier == "fast" and not batch:
            context["speed"] = "fast"

        cost = book.cost(provider.id, model.id, usage, service_tier=tier, batch=batch)

        assert cost.nanos == _theirs(
            model,
            provider,
            context,
            input_tokens=total,
            output_tokens=out,
            cache_read_tokens=cached,
            cache_write_tokens=written,
            cache_write_1h_tokens=for_an_hour,
        ), (provider.id, model.id, tier, batch)
        assert cost.flagged is None
        compared += 1
    assert compared > 2_000


@given(
    name=st.sampled_from(["gpt-4o", "gpt-5.4", "gpt-6-sol", "o3", "gpt-4o-mini", "text-embedding-3-small"]),
    tier=st.sampled_from(TIERS),
    total=st.integers(0, 2_000_000),
    out=st.integers(0, 200_000),
    share=st.fractions(0, 1),
)
def test_the_fast_way_and_the_exact_way_agree(name: str, tier: str | None, total: int, out: int, share: object) -> None:
    book = _BOOK
    usage = Usage(input_tokens=total, output_tokens=out, cached_input_tokens=int(total * share))  # type: ignore[operator]
    price = book._price("openai", (None, name, None), tier, False, AT // 86_400_000)
    assert price is not None

    fast = price.linear(usage)

    assert fast is not None
    assert round(Decimal(fast) / 1000) == price.exactly(usage, AT, tier, False)


_BOOK = PriceBook(clock=lambda: AT)


def test_a_long_prompt_moves_the_whole_call_to_the_dearer_tier(book: PriceBook) -> None:
    short = book.cost("google", "gemini-2.5-pro", Usage(input_tokens=200_000, output_tokens=0))
    long = book.cost("google", "gemini-2.5-pro", Usage(input_tokens=200_001, output_tokens=0))

    assert short.nanos == 250_000_000
    assert long.nanos == 500_002_500


def test_half_a_nano_is_rounded_to_even_once(book: PriceBook) -> None:
    # A cached token of gpt-5-nano costs 5 nano-dollars, one on the flex tier 2.5.
    def cached(count: int) -> int | None:
        usage = Usage(input_tokens=count, output_tokens=0, cached_input_tokens=count)
        return book.cost("openai", "gpt-5-nano", usage, service_tier="flex").nanos

    assert [cached(count) for count in (1, 2, 3, 4)] == [2, 5, 8, 10]


def test_cache_writes_for_an_hour_cost_more_than_those_for_five_minutes(book: PriceBook) -> None:
    # The numbers of a recorded exchange: 17 plain input tokens, 2056 written.
    five_minutes = Usage(2073, 100, 0, 2056, parts={"cache_write_5m": 2056, "cache_write_1h": 0})
    an_hour = Usage(2073, 100, 0, 2056, parts={"cache_write_5m": 0, "cache_write_1h": 2056})

    assert book.cost("anthropic", "claude-sonnet-4-20250514", five_minutes).nanos == 51_000 + 7_710_000 + 1_500_000
    assert book.cost("anthropic", "claude-sonnet-4-20250514", an_hour).nanos == 51_000 + 12_336_000 + 1_500_000


def test_cost_takes_the_sums_over_iterations_not_the_top_level(book: PriceBook) -> None:
    usage = Usage(
        input_tokens=181,
        output_tokens=8,
        parts={"iterations_input": 55_377, "iterations_cached_input": 55_096, "iterations_output": 91},
    )

    cost = book.cost("anthropic", "claude-sonnet-4-6", usage)

    assert cost.nanos == 281 * 3_000 + 55_096 * 300 + 91 * 15_000


def test_iterations_of_an_advisor_are_priced_as_the_advisors(book: PriceBook) -> None:
    usage = Usage(
        input_tokens=2_390,
        output_tokens=121,
        parts={
            "iterations_input": 4_908,
            "iterations_output": 143,
            "iterations_input@claude-opus-4-8": 2_518,
            "iterations_output@claude-opus-4-8": 22,
        },
    )

    cost = book.cost("anthropic", "claude-sonnet-5", usage)

    assert cost.nanos == 2_390 * 2_000 + 121 * 10_000 + 2_518 * 5_000 + 22 * 25_000


def test_sound_is_priced_as_sound_where_it_has_a_price(book: PriceBook) -> None:
    usage = Usage(input_tokens=1_000, output_tokens=500, audio_input_tokens=400, audio_output_tokens=100)

    cost = book.cost("openai", "gpt-audio", usage)

    assert cost.nanos == 600 * 2_500 + 400 * 32_000 + 400 * 10_000 + 100 * 64_000


def test_server_tools_with_a_price_are_added(book: PriceBook) -> None:
    usage = Usage(input_tokens=1_000, output_tokens=0, parts={"web_searches": 3, "web_fetches": 5})

    cost = book.cost("anthropic", "claude-sonnet-4-6", usage)

    assert cost.nanos == 3_000_000 + 3 * 10_000_000


def test_seconds_of_sound_are_priced(book: PriceBook) -> None:
    assert book.cost("openai", "whisper-1", Usage(parts={"seconds": 60})).nanos == 6_000_000


def test_more_cached_tokens_than_input_is_clamped_and_never_raises(book: PriceBook) -> None:
    # Azure's Grok says so: cached tokens beyond the prompt's.
    usage = Usage(input_tokens=10, output_tokens=1, cached_input_tokens=400)

    assert book.cost("openai", "gpt-4o", usage).nanos == 10 * 1_250 + 10_000


@given(
    name=st.sampled_from(["gpt-4o", "gpt-realtime", "gpt-audio", "whisper-1", "gpt-image-1", "nobody-knows-me"]),
    provider=st.sampled_from(["openai", "anthropic", "google", "xai", "ollama", None]),
    counts=st.lists(st.none() | st.integers(-(2**40), 2**40), min_size=7, max_size=7),
    parts=st.dictionaries(
        st.sampled_from(
            ["cache_write_1h", "cache_write_5m", "seconds", "images", "iterations_input", "web_searches", "pages"]
        ),
        st.integers(-10, 2**40),
    ),
)
def test_cost_never_raises_and_is_never_negative(
    name: str, provider: str | None, counts: list[int | None], parts: dict[str, int]
) -> None:
    cost = _BOOK.cost(provider, name, Usage(*counts, parts=parts))

    assert cost.nanos is None or cost.nanos >= 0
    assert cost.price_version


def test_usage_that_says_nothing_has_no_cost_rather_than_none_to_pay(book: PriceBook) -> None:
    cost = book.cost("openai", "gpt-4o", Usage())

    assert cost.nanos is None
    assert cost.flagged == "unpriced"


def test_the_callers_decimal_context_changes_nothing(book: PriceBook) -> None:
    usage = Usage(input_tokens=123_457, output_tokens=76_543, audio_input_tokens=12_345)
    expected = book.cost("openai", "gpt-audio", usage)

    with localcontext(getcontext()) as context:
        context.prec = 3
        assert PriceBook(clock=lambda: AT).cost("openai", "gpt-audio", usage) == expected


# ---------------------------------------------------------------- which model it was


def test_the_answers_own_model_is_priced_when_it_is_known(book: PriceBook) -> None:
    usage = Usage(input_tokens=1_000, output_tokens=0, model="gpt-4o-2024-05-13")

    assert book.cost("openai", "gpt-4o", usage).nanos == 5_000_000


def test_an_unknown_dated_name_falls_back_to_the_requested_model(book: PriceBook) -> None:
    usage = Usage(input_tokens=1_000, output_tokens=0, model="deployment-7-2026-11-11")

    cost = book.cost("azure", "deployment-7-2026-11-11", usage, requested_model="gpt-4o")

    assert cost.nanos == 2_500_000
    assert cost.flagged is None


def test_a_price_of_ones_own_wins_over_a_listed_one() -> None:
    rules = PriceRules(models={"GPT-4o": ModelPrice(Decimal("1.5"), Decimal(6), Decimal("0.5"), None, Decimal("0.01"))})
    book = PriceBook(rules, clock=lambda: AT)
    usage = Usage(input_tokens=1_000, output_tokens=100, cached_input_tokens=200, model="gpt-4o-2024-08-06")

    cost = book.cost("openai", "gpt-4o", usage)

    assert cost.nanos == 800 * 1_500 + 200 * 500 + 100 * 6_000 + 10_000_000


def test_a_price_for_one_provider_leaves_the_others_alone() -> None:
    book = PriceBook(PriceRules(models={"azure/gpt-4o": ModelPrice(Decimal(9), Decimal(9))}), clock=lambda: AT)

    assert book.rates("azure", "gpt-4o").input_nanos == 9_000
    assert book.rates("openai", "gpt-4o").input_nanos == 2_500


def test_a_negative_price_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"price output = Decimal\('-1'\)"):
        ModelPrice(Decimal(1), Decimal(-1))


@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("openai", "gpt-4o-2024-08-06"),
        ("xai", "grok-4"),
        ("vertex", "claude-3-7-sonnet@20250219"),
        ("bedrock", "us.anthropic.claude-sonnet-4-20250514-v1:0"),
        ("vercel-gateway", "openai/gpt-5"),
        ("google", "models/gemini-2.5-pro"),
        ("litellm-proxy", "gpt-3.5-turbo"),
        (None, "claude-sonnet-4-6"),
        (None, "gemini-2.5-flash"),
    ],
)
def test_models_are_found_under_the_names_that_providers_use(book: PriceBook, provider: str, model: str) -> None:
    assert book.known(model, provider)


def test_a_model_without_a_provider_is_the_makers(book: PriceBook) -> None:
    assert book.rates(None, "gpt-4o-mini").input_nanos == 150


# ---------------------------------------------------------------- unpriced


def test_an_unpriced_model_costs_the_providers_dearest_price_and_says_so(book: PriceBook) -> None:
    cost = book.cost("anthropic", "claude-nobody-knows", Usage(input_tokens=10, output_tokens=10))
    rates = book.rates("mistral", "something-new")

    assert cost.flagged == "ceiling"
    assert cost.nanos is not None
    assert cost.nanos > 0
    assert (rates.flagged, rates.input_nanos, rates.output_nanos) == ("ceiling", 2_700, 8_100)


def test_an_unknown_provider_has_the_dearest_price_of_the_three_markets(book: PriceBook) -> None:
    nobody = book.rates(None, "nobody-knows-me")

    for provider in ("openai", "anthropic", "google", "ollama"):
        one = book.rates(provider, "nobody-knows-me")
        assert nobody.input_nanos >= one.input_nanos > 0
        assert nobody.output_nanos >= one.output_nanos > 0


def test_deny_refuses_an_unpriced_model_before_the_call_but_never_at_the_settlement() -> None:
    book = PriceBook(PriceRules(unpriced="deny"), clock=lambda: AT)

    with pytest.raises(Unpriced, match="nobody-knows-me") as refused:
        book.rates("openai", "nobody-knows-me")

    assert isinstance(refused.value, GuardError)
    assert book.cost("openai", "nobody-knows-me", Usage(input_tokens=1, output_tokens=1)).flagged == "ceiling"


def test_allow_gives_an_unpriced_model_no_cost_which_is_not_zero() -> None:
    book = PriceBook(PriceRules(unpriced="allow"), clock=lambda: AT)

    rates = book.rates("openai", "nobody-knows-me")
    cost = book.cost("openai", "nobody-knows-me", Usage(input_tokens=1, output_tokens=1))

    assert (rates.input_nanos, rates.output_nanos, rates.flagged) == (0, 0, "unpriced")
    assert (cost.nanos, cost.flagged) == (None, "unpriced")


def test_names_that_callers_make_up_leave_nothing_behind(book: PriceBook) -> None:
    snapshot = data_snapshot.get_snapshot()
    before = (len(snapshot._provider_misses), len(snapshot._provider_cache), len(snapshot._lookup_cache))

    for number in range(3_000):
        book.known(f"made-up-{number}", "openai")
    book.known("x" * (MODEL_NAME_MAX + 1), "openai")

    assert before == (len(snapshot._provider_misses), len(snapshot._provider_cache), len(snapshot._lookup_cache))
    assert book._find.cache_info().currsize <= 2_048


def test_an_overlong_name_is_unknown(book: PriceBook) -> None:
    assert not book.known("gpt-4o" + "-x" * MODEL_NAME_MAX, "openai")


# ---------------------------------------------------------------- bounds for a hold


def test_rates_bound_the_cost_of_every_listed_model(book: PriceBook) -> None:
    chance = random.Random(7)

    for provider, model in _own_models(book):
        total, out = chance.randrange(1_000_000), chance.randrange(40_000)
        cached = chance.randrange(total + 1)
        written = chance.randrange(total - cached + 1)
        usage = Usage(total, out, cached, written, parts={"cache_write_1h": chance.randrange(written + 1)})
        tier = chance.choice(TIERS)
        rates = book.rates(provider.id, model.id, tier)

        held = total * rates.input_nanos + out * rates.output_nanos + rates.request_nanos

        cost = book.cost(provider.id, model.id, usage, service_tier=tier).nanos
        assert cost is not None
        assert held >= cost, (provider.id, model.id)


def test_rates_are_the_dearest_tier(book: PriceBook) -> None:
    rates = book.rates("google", "gemini-2.5-pro")

    assert (rates.input_nanos, rates.output_nanos) == (2_500, 15_000)


def test_a_dearer_service_tier_is_held_and_a_cheaper_one_is_not_relied_on(book: PriceBook) -> None:
    standard = book.rates("openai", "gpt-5")

    assert book.rates("openai", "gpt-5", "priority").input_nanos == 2 * standard.input_nanos
    assert book.rates("openai", "gpt-5", "flex").input_nanos == standard.input_nanos


def test_cache_writes_are_held_only_for_requests_that_can_write(book: PriceBook) -> None:
    def held(*kinds: str) -> int:
        return book.rates("anthropic", "claude-sonnet-4-6", kinds=kinds).input_nanos

    assert (held(), held("cache_write"), held("cache_write", "cache_write_1h")) == (3_000, 3_750, 6_000)
    assert book.rates("anthropic", "claude-sonnet-4-6").input_nanos == 6_000


def test_sound_is_held_only_for_requests_with_sound(book: PriceBook) -> None:
    assert book.rates("openai", "gpt-audio", kinds=()).input_nanos == 2_500
    assert book.rates("openai", "gpt-audio", kinds=("audio",)).input_nanos == 32_000


def test_tomorrows_price_is_held_today() -> None:
    # gemini-4-argon doubles on 1 December 2026.
    last_day = 1_796_083_200_000 - 3_600_000

    rates = PriceBook(clock=lambda: last_day).rates("google", "gemini-4-argon")
    cost = PriceBook(clock=lambda: last_day).cost("google", "gemini-4-argon", Usage(input_tokens=1, output_tokens=0))

    assert rates.input_nanos == 4_000
    assert cost.nanos == 2_000


@pytest.mark.parametrize(
    ("model", "most", "hidden"),
    [
        ("gpt-4o", 16_384, False),
        ("gpt-4o-2024-05-13", 4_096, False),
        ("gpt-4.1-mini", 32_768, False),
        ("openai/gpt-5-mini", 128_000, True),
        ("gpt-5-chat-latest", 16_384, False),
        ("gpt-6-sol", 128_000, True),
        ("o1-mini", 65_536, True),
        ("o3-2025-04-16", 100_000, True),
        ("o4-mini", 100_000, True),
        ("claude-3-haiku-20240307", 4_096, False),
        ("claude-3-5-sonnet-latest", 8_192, False),
        ("us.anthropic.claude-sonnet-4-20250514-v1:0", 64_000, False),
        ("claude-opus-4-1-20250805", 32_000, False),
        ("claude-opus-4-5", 64_000, False),
        ("claude-haiku-4-5", 64_000, False),
        ("claude-sonnet-4-6", 128_000, False),
        ("claude-opus-5-5", 128_000, True),
        ("gemini-2.0-flash", 8_192, False),
        ("gemini-2.5-flash", 65_535, True),
        ("gemini-3.1-pro-preview", 65_535, True),
        ("text-embedding-3-small", None, False),
        ("nobody-knows-me", 16_384, True),
    ],
)
def test_output_limits_by_name(model: str, most: int | None, hidden: bool) -> None:
    limit = limits_of(model)

    assert (limit.max_output, limit.hidden_output) == (most, hidden)


# ---------------------------------------------------------------- the stamp, and the import


def test_the_version_names_the_tables_and_changes_with_the_operators_prices() -> None:
    plain = PriceBook().price_version
    mine = PriceBook(PriceRules(models={"a": ModelPrice(Decimal(1), Decimal(2))})).price_version
    dearer = PriceBook(PriceRules(models={"a": ModelPrice(Decimal(1), Decimal(3))})).price_version

    assert plain.startswith("genai-prices/")
    assert mine.startswith(plain + "+overrides-")
    assert len({plain, mine, dearer}) == 3
    assert mine == PriceBook(PriceRules(models={"a": ModelPrice(Decimal(1), Decimal(2))})).price_version


def test_a_price_book_is_made_without_loading_the_tables() -> None:
    import subprocess

    code = (
        "import sys; from llm_guard_mw.pricing import PriceBook; PriceBook().price_version; "
        "sys.exit('genai_prices' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_threads_may_share_a_book() -> None:
    book = PriceBook(clock=lambda: AT)
    seen: list[int | None] = []

    def ask() -> None:
        seen.extend(book.cost("openai", "gpt-4o", Usage(input_tokens=n, output_tokens=n)).nanos for n in range(200))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(x for x in seen if x is not None) == sorted(n * 12_500 for n in range(200) for _ in range(4))

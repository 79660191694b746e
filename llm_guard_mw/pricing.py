"""What usage is worth: a price book of our own over the tables of `genai-prices`.

`PriceBook.rates` answers before a call, in upper bounds: whole nano-dollars a token, rounded up, the dearest
price that may apply. `PriceBook.cost` answers after it, exactly: integer pico-dollars where the price is
linear, `genai-prices`' own Decimal arithmetic where it is not, rounded half-even once.

Rule 1: An unpriced model never costs $0. It costs the provider's dearest price, is refused, or its cost is
        None; the result is flagged.
Rule 2: Model names come from callers. They are looked up at most once each, in caches with a fixed number of
        places, and names longer than MODEL_NAME_MAX are unknown without a look. (The caches inside
        `genai-prices` grow with every unknown name, so none of its cached entry points is used.)
Rule 3: Nothing global is read or set: no custom snapshot, no updater, no network, no ambient Decimal context.
Rule 4: `cost` never raises. Usage that contradicts itself is clamped, in the direction that costs more.

docs/explanation/prices.md has the words; the names of `Usage.parts` that carry a price are PART_UNITS here.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context, Decimal, localcontext
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from llm_guard_mw.arithmetic import MS_PER_DAY, utc
from llm_guard_mw.errors import GuardError
from llm_guard_mw.model import Cost, Rates, Usage

if TYPE_CHECKING:
    from genai_prices.types import ModelInfo, Provider
    from genai_prices.types import ModelPrice as ListedPrice

MODEL_NAME_MAX = 128

#: A second of sound counts as so many tokens in an estimate, whatever the provider bills it by.
TOKENS_PER_AUDIO_SECOND = 32

#: Names in `Usage.parts` that carry a price, and the units of `genai-prices` they are counted in. A part that
#: has the name of such a unit itself is priced as well. All others (free server tools, say) cost nothing.
PART_UNITS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cache_write_5m": ("cache_write_5m_tokens",),
        "cache_write_1h": ("cache_write_1h_tokens",),
        "seconds": ("audio_seconds", "input_audio_seconds"),
        "characters": ("input_characters",),
        "pages": ("input_document_pages",),
        "search_units": ("rerank_searches",),
        "web_searches": ("web_searches",),
        "file_searches": ("storage_searches",),
        "document_searches": ("storage_searches",),
        "x_searches": ("social_searches",),
        "image_input_tokens": ("input_image_tokens",),
        "image_output_tokens": ("output_image_tokens",),
        "code_executions": ("code_executions",),
    }
)

#: The sums over Anthropic's `usage.iterations`, inclusive like Usage itself. Where they stand in
#: `Usage.parts` they are what is billed, in place of the top level. `NAME@model` is the part of NAME that
#: another model ran (an advisor), priced as that model's.
ITERATION_PARTS = (
    "iterations_input",
    "iterations_cached_input",
    "iterations_cache_write",
    "iterations_cache_write_1h",
    "iterations_output",
)

#: What a request may be billed for besides plain text, as far as it can be told from the request.
INPUT_KINDS = ("cache_write", "cache_write_1h", "audio", "image")

_MARKETS = ("openai", "anthropic", "google")
_SEARCH_FIRST = (
    *_MARKETS,
    "mistral",
    "deepseek",
    "x-ai",
    "cohere",
    "perplexity",
    "moonshotai",
    "zai",
    "minimax",
    "meta",
    "voyageai",
    "groq",
    "together",
    "fireworks",
    "aws",
    "openrouter",
)

#: Who sells other makers' models at the makers' prices, so that the maker's price is a real one.
_RESELLERS = frozenset(
    {
        "local-openai-compatible",
        "litellm-proxy",
        "mirascope-router",
        "openai-compatible",
        "openrouter",
        "portkey",
        "pydantic-gateway",
        "vercel-gateway",
    }
)

_PICO_PER_NANO = 1_000
_EXACT = Context(prec=60)
_LINEAR_KEYS = {
    "input_mtok": "input",
    "output_mtok": "output",
    "cache_read_mtok": "cached",
    "cache_write_mtok": "write",
    "cache_write_1h_mtok": "write_1h",
}

Unpriceds = Literal["ceiling", "deny", "allow"]


class Unpriced(GuardError):
    """No price is known for a model, and the rules say that such a model is refused."""

    def __init__(self, provider: str | None, model: str | None) -> None:
        self.provider = provider
        self.model = model
        super().__init__(
            f"no price is known for model {_short(model)!r} of provider {_short(provider)!r}: give it one under "
            '[prices.models."NAME"], or set unpriced = "ceiling"'
        )


@dataclass(frozen=True, slots=True)
class ModelPrice:
    """A price of the operator's own, in USD per million tokens; `request` in USD per request.

    A missing `cached_input` or `cache_write` means that such tokens cost what plain input costs.
    """

    input: Decimal
    output: Decimal = Decimal(0)
    cached_input: Decimal | None = None
    cache_write: Decimal | None = None
    request: Decimal | None = None

    def __post_init__(self) -> None:
        for name in ("input", "output", "cached_input", "cache_write", "request"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, Decimal) or not value.is_finite() or value < 0:
                raise ValueError(f"price {name} = {value!r}: a Decimal of 0 or more is needed")


@dataclass(frozen=True, slots=True)
class PriceRules:
    """What the operator says about prices: what becomes of unpriced models, and prices of their own.

    A key of `models` is a model's name, or `provider/name` for one provider only; capitals do not matter.
    """

    unpriced: Unpriceds = "ceiling"
    models: Mapping[str, ModelPrice] = field(default_factory=lambda: MappingProxyType({}))


class PriceBook:
    """Prices by provider and model.

        book = PriceBook(PriceRules(models={"my-finetune": ModelPrice(Decimal(3), Decimal(12))}))
        book.rates("openai", "gpt-4o").output_nanos                    # 10_000
        book.cost("openai", "gpt-4o", Usage(input_tokens=1_000)).nanos  # 2_500_000

    `clock` gives milliseconds since the epoch: some prices begin on a date.
    The tables are loaded at the first question, which takes a third of a second; `warm()` does it before.
    """

    def __init__(self, rules: PriceRules | None = None, *, clock: Callable[[], int] | None = None) -> None:
        self._rules = rules or PriceRules()
        self._overrides = {name.lower(): price for name, price in self._rules.models.items()}
        self._clock = clock or _wall_clock
        self.price_version = _price_version(self._rules)
        # Bounded, and safe between threads: these are the only places where callers' names are kept.
        self._find = lru_cache(maxsize=2048)(self._look_up)
        self._price = lru_cache(maxsize=4096)(self._price_of)
        self._rates = lru_cache(maxsize=4096)(self._rates_of)
        self._ceiling = lru_cache(maxsize=256)(self._ceiling_of)

    def warm(self) -> None:
        """Load the tables now, off the request path."""
        _tables()

    def known(self, model: str | None, provider: str | None = None) -> bool:
        """Whether there is a price, of the operator's own or a listed one."""
        provider, model = _bounded(provider), _bounded(model)
        return self._override(provider, (model,)) is not None or self._find(provider, model) is not None

    def rates(
        self,
        provider: str | None,
        model: str | None,
        service_tier: str | None = None,
        *,
        kinds: tuple[str, ...] | None = None,
        at_ms: int | None = None,
    ) -> Rates:
        """Upper bounds for a hold.

        `kinds` are those INPUT_KINDS that the request can be billed for; None: all of them.
        Raises Unpriced if the rules deny unpriced models.
        """
        day = (self._clock() if at_ms is None else at_ms) // MS_PER_DAY
        name = _bounded(model)
        rates = self._rates(_bounded(provider), name, _bounded(service_tier), kinds, day)
        if rates is None:
            raise Unpriced(provider, model)
        return rates

    def cost(
        self,
        provider: str | None,
        model: str | None,
        usage: Usage,
        *,
        service_tier: str | None = None,
        at_ms: int | None = None,
        batch: bool = False,
        requested_model: str | None = None,
    ) -> Cost:
        """What `usage` is worth, in nano-dollars, rounded half-even once. Never raises.

        The model is the first of `usage.model`, `model` and `requested_model` (the name that went out) with a
        price: a price of the operator's own for any of them, else a listed one.
        """
        at = self._clock() if at_ms is None else at_ms
        names = (_bounded(usage.model), _bounded(model), _bounded(requested_model))
        tier = _bounded(service_tier)
        provider = _bounded(provider)
        if usage.parts and ("iterations_input" in usage.parts or "iterations_output" in usage.parts):
            return self._cost_of_iterations(provider, names, usage, tier, at, batch)
        return self._cost_of(provider, names, usage, tier, at, batch)

    # ------------------------------------------------------------ after the call

    def _cost_of(
        self,
        provider: str | None,
        names: tuple[str | None, ...],
        usage: Usage,
        tier: str | None,
        at: int,
        batch: bool,
    ) -> Cost:
        price = self._price(provider, names, tier, batch, at // MS_PER_DAY)
        if price is None or _says_nothing(usage):
            return Cost(None, self.price_version, "unpriced")
        pico = price.linear(usage)
        nanos = _half_even(pico) if pico is not None else price.exactly(usage, at, tier, batch)
        return Cost(nanos, self.price_version, price.flagged)

    def _cost_of_iterations(
        self, provider: str | None, names: tuple[str | None, ...], usage: Usage, tier: str | None, at: int, batch: bool
    ) -> Cost:
        """The sums over iterations in place of the top level, and each other model's on their own."""
        total = 0
        flagged: str | None = None
        for model, billed in _iterations(usage):
            cost = self._cost_of(provider, names if model is None else (model, *names), billed, tier, at, batch)
            if cost.nanos is None:
                return cost
            total += cost.nanos
            flagged = flagged or cost.flagged
        return Cost(total, self.price_version, flagged)

    def _price_of(
        self, provider: str | None, names: tuple[str | None, ...], tier: str | None, batch: bool, day: int
    ) -> _Price | None:
        """The price of the first of `names` that has one, for the whole of a day. None: unpriced, and allowed."""
        if (override := self._override(provider, names)) is not None:
            return _own_price(override)
        for name in names:
            if (found := self._find(provider, name)) is not None:
                return _listed_price(*found, tier, batch, day)
        if self._rules.unpriced == "allow":
            return None
        # Under "deny" the call ran nevertheless (the provider answered with another name): it costs the most
        # that it can have cost, since a settlement cannot be refused.
        return self._ceiling(provider, day)

    # ------------------------------------------------------------ before the call

    def _rates_of(
        self, provider: str | None, model: str | None, tier: str | None, kinds: tuple[str, ...] | None, day: int
    ) -> Rates | None:
        limit = limits_of(model)
        found = self._find(provider, model)
        context = found[1].context_window if found else None
        max_output = limit.max_output
        if max_output is not None and context is not None:
            max_output = min(max_output, context)
        flagged: str | None = None
        if (override := self._override(provider, (model,))) is not None:
            bound = _own_price(override).bound(kinds, automatic_writes=True)
        elif found is not None:
            # A hold may be settled tomorrow, and a tier may be refused for the standard one: the dearest of them.
            prices = [_listed_price(*found, which, False, day + later) for which in {None, tier} for later in (0, 1)]
            bound = _dearest(price.bound(kinds, automatic_writes="claude" not in found[1].id) for price in prices)
        elif self._rules.unpriced == "deny":
            return None
        elif self._rules.unpriced == "allow":
            flagged, bound = "unpriced", (Decimal(0), Decimal(0), Decimal(0))
        else:
            flagged, bound = "ceiling", self._ceiling(provider, day).bound(None, automatic_writes=True)
        return Rates(
            model=model,
            provider=provider,
            input_nanos=_ceil_nanos(bound[0]),
            output_nanos=_ceil_nanos(bound[1]),
            request_nanos=_ceil_nanos(bound[2]),
            price_version=self.price_version,
            flagged=flagged,
            context_window=context,
            max_output=max_output,
            hidden_output=limit.hidden_output,
        )

    def _ceiling_of(self, provider: str | None, day: int) -> _Price:
        """The dearest input and the dearest output price of all text models that a provider lists.

        A provider that is not in the tables, or none, has the dearest of OpenAI, Anthropic and Google.
        """
        listed = _provider(provider)
        sellers = [listed] if listed else [_tables().by_id[name] for name in _MARKETS]
        pico_in = pico_out = Decimal(0)
        for seller in sellers:
            for model in seller.models:
                prices = model.get_prices(utc(day * MS_PER_DAY))
                if prices.input_mtok is None or prices.output_mtok is None:
                    continue
                pico_in = max(pico_in, *_levels(prices.input_mtok))
                pico_out = max(pico_out, *_levels(prices.output_mtok))
        if not pico_in and not pico_out and listed is not None:
            return self._ceiling(None, day)  # it lists no text model at all
        return _Price(bands=((0, _Band(input=_pico(pico_in), output=_pico(pico_out))),), flagged="ceiling")

    # ------------------------------------------------------------ finding a price

    def _override(self, provider: str | None, names: Iterable[str | None]) -> ModelPrice | None:
        if not self._overrides:
            return None
        for name in names:
            if name is None:
                continue
            price = self._overrides.get(f"{provider}/{name}".lower()) if provider else None
            price = price or self._overrides.get(name.lower())
            if price is not None:
                return price
        return None

    def _look_up(self, provider: str | None, model: str | None) -> tuple[Provider, ModelInfo] | None:
        """The listed model of that name: the provider's own, or, where the seller is nobody or a reseller, the
        maker's."""
        if not model:
            return None
        name = model.removeprefix("models/")
        seller = _provider(provider)
        if seller is not None:
            found = seller.find_model(name, all_providers=_tables().providers)
            if found is not None:
                return seller, found
        if provider is not None and provider.lower() not in _RESELLERS:
            return None
        return _makers_price(name)


# ---------------------------------------------------------------- one price


@dataclass(frozen=True, slots=True)
class _Band:
    """Pico-dollars a token in one stretch of input lengths. None: such tokens cost what plain input costs."""

    input: int = 0
    output: int = 0
    cached: int | None = None
    write: int | None = None
    write_1h: int | None = None


@dataclass(frozen=True, slots=True)
class _Price:
    """One model's price on one day: linear bands by input length, and what else the provider prices.

    `bands` is empty where the price is not linear within a day (hours of the day) or not a whole number of
    pico-dollars; then every question goes to `genai-prices`. `others` are the units priced beyond the bands'.
    """

    bands: tuple[tuple[int, _Band], ...]
    request: int = 0
    others: frozenset[str] = frozenset()
    flagged: str | None = None
    listed: tuple[Provider, ModelInfo] | None = None
    prices: tuple[ListedPrice, ...] = ()

    def linear(self, usage: Usage) -> int | None:
        """The cost in pico-dollars, or None if this usage, or this price, is not a matter of the bands alone."""
        if not self.bands:
            return None
        others = self.others
        write_1h = 0
        if usage.parts:
            for name, count in usage.parts.items():
                if name == "cache_write_1h":
                    write_1h = max(count, 0)
                elif name != "cache_write_5m" and count and others and _priced_units(name, others):
                    return None
        if others and (
            (usage.audio_input_tokens and "input_audio_tokens" in others)
            or (usage.audio_output_tokens and "output_audio_tokens" in others)
            or (usage.reasoning_tokens and "output_reasoning_tokens" in others)
        ):
            return None
        total, cached, write, write_1h = _clamped(usage, write_1h)
        for start, band in reversed(self.bands):  # noqa: B007 - the last one left is the one that applies
            if total > start:
                break
        pico = (usage.output_tokens or 0) * band.output if (usage.output_tokens or 0) > 0 else 0
        plain = total
        if band.cached is not None:
            plain -= cached
            pico += cached * band.cached
        if band.write is not None:
            plain -= write
            if band.write_1h is not None:
                write -= write_1h
                pico += write_1h * band.write_1h
            pico += write * band.write
        return pico + plain * band.input + self.request

    def exactly(self, usage: Usage, at: int, tier: str | None, batch: bool) -> int:
        """The cost in nano-dollars by the arithmetic of `genai-prices`."""
        from genai_prices.types import Usage as Counted

        if self.listed is None:
            raise AssertionError("only a listed price has more than bands")
        provider, model = self.listed
        counts = _counts(usage, self.others)
        with localcontext(_EXACT):
            total = model.calc_price(
                Counted(**counts),
                provider,
                genai_request_timestamp=utc(at),
                price_context=_context(tier, batch),
            ).total_price
            return int((total * 10**9).quantize(Decimal(1), ROUND_HALF_EVEN))

    def bound(self, kinds: tuple[str, ...] | None, *, automatic_writes: bool) -> tuple[Decimal, Decimal, Decimal]:
        """The dearest input token, output token and request, in pico-dollars.

        `automatic_writes`: the provider may write its cache unasked, so a write counts whatever `kinds` says.
        """
        wanted = frozenset(INPUT_KINDS if kinds is None else kinds)
        if automatic_writes:
            wanted |= {"cache_write"}
        if not self.prices:
            bands = [band for _, band in self.bands]
            inputs = [Decimal(max(band.input, band.cached or 0)) for band in bands]
            inputs += [Decimal(b.write) for b in bands if b.write is not None and wanted & {"cache_write"}]
            return max(inputs), max(Decimal(band.output) for band in bands), Decimal(self.request)
        return _dearest(_bound_of(prices, wanted) for prices in self.prices)


def _own_price(price: ModelPrice) -> _Price:
    """An override as a price of one band."""
    with localcontext(_EXACT):
        band = _Band(
            input=_pico(price.input),
            output=_pico(price.output),
            cached=None if price.cached_input is None else _pico(price.cached_input),
            write=None if price.cache_write is None else _pico(price.cache_write),
        )
        request = 0 if price.request is None else int((price.request * 10**12).to_integral_value(ROUND_HALF_EVEN))
    return _Price(bands=((0, band),), request=request)


def _listed_price(provider: Provider, model: ModelInfo, tier: str | None, batch: bool, day: int) -> _Price:
    """A listed model's price through one UTC day."""
    from genai_prices.types import TieredPrices

    at = utc(day * MS_PER_DAY)
    context = _context(tier, batch) if any(model is own for own in provider.models) else None
    prices = model.get_prices(at, context)
    priced = {key: value for key, value in prices.__dict__.items() if value is not None}
    units = _tables().units
    others = frozenset(
        units[key] for key in priced if key not in _LINEAR_KEYS and key != "requests_kcount" and key in units
    )
    if _changes_within_a_day(model):
        hours = tuple(model.get_prices(at + timedelta(hours=hour, minutes=30), context) for hour in range(24))
        return _Price(bands=(), others=_all_units(hours), listed=(provider, model), prices=hours)
    starts = {0}
    for value in priced.values():
        if isinstance(value, TieredPrices):
            starts |= {tier_.start for tier_ in value.tiers}
    bands: list[tuple[int, _Band]] = []
    for start in sorted(starts):
        pico: dict[str, int] = {}
        for key, name in _LINEAR_KEYS.items():
            if (value := priced.get(key)) is None:
                continue
            exact = _at_start(value, start) * 10**6
            if exact != exact.to_integral_value():
                return _Price(bands=(), others=_all_units((prices,)), listed=(provider, model), prices=(prices,))
            pico[name] = int(exact)
        if "write_1h" in pico and "write" not in pico:
            return _Price(bands=(), others=_all_units((prices,)), listed=(provider, model), prices=(prices,))
        bands.append((start, _Band(**pico)))
    requests = priced.get("requests_kcount")
    request = _request_pico(requests) if requests is not None else 0
    return _Price(bands=tuple(bands), request=request, others=others, listed=(provider, model), prices=(prices,))


def _request_pico(price: Any) -> int:  # Any: Decimal or TieredPrices, of a library that is imported lazily
    return int((max(_levels(price)) * 10**9).to_integral_value(ROUND_HALF_EVEN))


def _bound_of(prices: ListedPrice, wanted: frozenset[str]) -> tuple[Decimal, Decimal, Decimal]:
    """The dearest token in and out, and the fixed price a request, in pico-dollars."""
    listed = {key: max(_levels(value)) for key, value in prices.__dict__.items() if value is not None}

    def per_token(*keys: str) -> Decimal:
        return max((listed[key] * 10**6 for key in keys if key in listed), default=Decimal(0))

    inputs = ["input_mtok", "cache_read_mtok"]  # a few sellers list cached input above plain input
    if "cache_write" in wanted:
        inputs += ["cache_write_mtok", "cache_write_5m_mtok"]
    if "cache_write_1h" in wanted:
        inputs += ["cache_write_1h_mtok"]
    if "audio" in wanted:
        inputs += ["input_audio_mtok"]
    if "image" in wanted:
        inputs += ["input_image_mtok", "input_video_mtok"]
    outputs = [key for key in listed if key.startswith("output_") and key.endswith("_mtok")]
    pico_in = per_token(*inputs)
    # An estimate counts sound and characters in tokens too (see `estimate`), so that they can be held at all.
    if hours := max(listed.get("input_audio_hours", Decimal(0)), listed.get("audio_hours", Decimal(0))):
        pico_in = max(pico_in, hours * 10**12 / 3600 / TOKENS_PER_AUDIO_SECOND)
    pico_in = max(pico_in, listed.get("input_mchars", Decimal(0)) * 10**6)
    fixed = sum((listed.get(key, Decimal(0)) for key in ("requests_kcount", "rerank_searches_kcount")), Decimal(0))
    return pico_in, per_token(*outputs), fixed * 10**9


def _dearest(bounds: Iterable[tuple[Decimal, Decimal, Decimal]]) -> tuple[Decimal, Decimal, Decimal]:
    inputs, outputs, requests = zip(*bounds, strict=True)
    return max(inputs), max(outputs), max(requests)


# ---------------------------------------------------------------- usage as counts


def _clamped(usage: Usage, write_1h: int) -> tuple[int, int, int, int]:
    """Input, cached, written and written for an hour, so that each is a part of what it is a part of.

    Providers do contradict themselves (Azure's Grok says more cached tokens than prompt tokens). The parts give
    way, since plain input costs more than cached input. Input that is not said is at least its parts.
    """
    cached = max(usage.cached_input_tokens or 0, 0)
    write = max(usage.cache_write_tokens or 0, 0)
    if usage.parts:
        write = max(write, write_1h + max(usage.parts.get("cache_write_5m", 0), 0))
    total = usage.input_tokens
    if total is None:
        return cached + write, cached, write, min(write_1h, write)
    total = max(total, 0)
    write = min(write, total)
    cached = min(cached, total - write)
    return total, cached, write, min(write_1h, write)


def _counts(usage: Usage, priced: frozenset[str]) -> dict[str, int]:
    """Usage in the units of `genai-prices`. Every priced unit is there, since it refuses to infer some of them."""
    counts = dict.fromkeys(priced, 0)
    for name, count in usage.parts.items():
        for unit in _priced_units(name, priced):
            counts[unit] = counts.get(unit, 0) + max(count, 0)
    write_1h = max(usage.parts.get("cache_write_1h", 0), 0)
    total, cached, write, write_1h = _clamped(usage, write_1h)
    out = max(usage.output_tokens or 0, 0)
    audio_in = max(usage.audio_input_tokens or 0, 0)
    if "input_audio_tokens" in priced:
        # It is not said how much of the cached input was sound. Sound is dearer, so the cached part gives way.
        audio_in = min(audio_in, total)
        write = min(write, total - audio_in)
        cached = min(cached, total - audio_in - write)
        counts["input_audio_tokens"] = audio_in
    others_in = sum(counts.get(unit, 0) for unit in ("input_image_tokens", "input_video_tokens"))
    total = max(total, cached + write + audio_in * ("input_audio_tokens" in priced) + others_in)
    counts |= {"input_tokens": total, "output_tokens": out, "cache_read_tokens": cached, "cache_write_tokens": write}
    counts["cache_write_1h_tokens"] = min(write_1h, write)
    if "cache_write_5m_tokens" in priced:
        counts["cache_write_5m_tokens"] = write - counts["cache_write_1h_tokens"]
    left = out
    for unit, said in (
        ("output_audio_tokens", usage.audio_output_tokens),
        ("output_reasoning_tokens", usage.reasoning_tokens),
        ("output_image_tokens", counts.get("output_image_tokens")),
        ("output_video_tokens", counts.get("output_video_tokens")),
        ("output_citation_tokens", counts.get("output_citation_tokens")),
    ):
        if unit in priced:
            counts[unit] = min(max(said or 0, 0), left)
            left -= counts[unit]
    return counts


def _iterations(usage: Usage) -> Iterable[tuple[str | None, Usage]]:
    """One Usage for each model that ran iterations; None is the model of the answer, which has what is left."""
    sums: dict[str | None, dict[str, int]] = {None: {}}
    parts: dict[str, int] = {}
    for key, count in usage.parts.items():
        name, _, other = key.partition("@")
        if name in ITERATION_PARTS:
            sums.setdefault(_bounded(other), {})[name] = max(count, 0)
        elif not key.startswith(("iterations_", "cache_write_")):
            parts[key] = count
    own = sums.pop(None)
    for said in sums.values():
        for name, count in said.items():
            own[name] = max(own.get(name, count) - count, 0)
    yield None, _usage_of(own, parts)
    for model, said in sums.items():
        yield model, _usage_of(said, {})


def _usage_of(sums: Mapping[str, int], parts: Mapping[str, int]) -> Usage:
    return Usage(
        input_tokens=sums.get("iterations_input", 0),
        output_tokens=sums.get("iterations_output", 0),
        cached_input_tokens=sums.get("iterations_cached_input"),
        cache_write_tokens=sums.get("iterations_cache_write"),
        parts={**parts, "cache_write_1h": sums.get("iterations_cache_write_1h", 0)},
    )


def _says_nothing(usage: Usage) -> bool:
    """Neither tokens nor a part that anyone prices: what it cost is unknown, which is not $0."""
    if usage.input_tokens is not None or usage.output_tokens is not None:
        return False
    if usage.cached_input_tokens is not None or usage.cache_write_tokens is not None:
        return False
    units = _tables().usage_keys
    return not any(name in PART_UNITS or name in units for name in usage.parts)


def _priced_units(part: str, priced: frozenset[str]) -> tuple[str, ...]:
    units = PART_UNITS.get(part, (part,))
    return tuple(unit for unit in units if unit in priced)


# ---------------------------------------------------------------- the tables of genai-prices


@dataclass(frozen=True, slots=True)
class _Tables:
    providers: list[Provider]
    by_id: dict[str, Provider]
    in_order: tuple[Provider, ...]
    units: dict[str, str]  # price key -> usage key
    usage_keys: frozenset[str]


_loaded: list[_Tables] = []
_loading = threading.Lock()


def _tables() -> _Tables:
    """The bundled tables, imported at first use: they cost a third of a second and 29 MB."""
    if _loaded:
        return _loaded[0]
    with _loading:
        if not _loaded:
            from genai_prices.data import providers
            from genai_prices.data_units import unit_data

            by_id = {provider.id: provider for provider in providers}
            first = [by_id[name] for name in _SEARCH_FIRST if name in by_id]
            rest = [provider for provider in providers if provider not in first]
            units = {str(unit.get("price_key", key)): key for key, unit in unit_data.items()}
            _loaded.append(_Tables(providers, by_id, (*first, *rest), units, frozenset(unit_data)))
    return _loaded[0]


@lru_cache(maxsize=256)
def _provider(name: str | None) -> Provider | None:
    """The listed provider of that name, by id or by its own rule for names. A generic seller is nobody."""
    from genai_prices.data_snapshot import find_provider_by_id

    if name is None or (name.lower() in _RESELLERS and name.lower() != "openrouter"):
        return None
    return find_provider_by_id(_tables().providers, name)


def _makers_price(name: str) -> tuple[Provider, ModelInfo] | None:
    """A model by name alone: `maker/model` at that maker, else the first seller that lists it, makers first."""
    maker, slash, tail = name.partition("/")
    if slash and (seller := _provider(_bounded(maker))) is not None and (found := seller.find_model(tail)):
        return seller, found
    for seller in _tables().in_order:
        if (found := seller.find_model(name)) is not None:
            return seller, found
    return None


def _context(tier: str | None, batch: bool) -> dict[str, str] | None:
    """What selects a variant of a price. A batch is not a tier to `genai-prices`, and Anthropic's fast is a speed."""
    context: dict[str, str] = {}
    if batch or tier == "batch":
        context["processing"] = "batch"
    elif tier is not None:
        context["service_tier"] = tier
        if tier == "fast":
            context["speed"] = tier
    return context or None


def _changes_within_a_day(model: ModelInfo) -> bool:
    from genai_prices.types import TimeOfDateConstraint

    prices = model.prices if isinstance(model.prices, list) else []
    constraints = [p.constraint for p in prices] + [v.constraint for v in model.price_variants or ()]
    return any(isinstance(constraint, TimeOfDateConstraint) for constraint in constraints)


def _all_units(prices: Iterable[ListedPrice]) -> frozenset[str]:
    units = _tables().units
    keys = {key for price in prices for key, value in price.__dict__.items() if value is not None}
    return frozenset(units[key] for key in keys if key in units and key != "requests_kcount")


def _levels(price: Any) -> tuple[Decimal, ...]:  # Any: Decimal or TieredPrices
    """All prices that a price may become, by input length."""
    if isinstance(price, Decimal):
        return (price,)
    return (price.base, *(tier.price for tier in price.tiers))


def _at_start(price: Any, start: int) -> Decimal:  # Any: Decimal or TieredPrices
    if isinstance(price, Decimal):
        return price
    level: Decimal = price.base
    for tier in price.tiers:
        if tier.start <= start and start > 0:
            level = tier.price
    return level


# ---------------------------------------------------------------- small arithmetic


def _pico(dollars_per_million: Decimal) -> int:
    """Pico-dollars a token. A price finer than that is rounded, at a millionth of a cent a million tokens."""
    return int((dollars_per_million * 10**6).to_integral_value(ROUND_HALF_EVEN))


def _ceil_nanos(pico: Decimal) -> int:
    return int((pico / _PICO_PER_NANO).to_integral_value(ROUND_CEILING))


def _half_even(pico: int) -> int:
    nanos, rest = divmod(pico, _PICO_PER_NANO)
    half = _PICO_PER_NANO // 2
    return nanos + (rest > half or (rest == half and nanos % 2 == 1))


def _bounded(name: str | None) -> str | None:
    """A name that is safe to keep: short, or none at all."""
    return name if name and len(name) <= MODEL_NAME_MAX else None


def _short(name: str | None) -> str | None:
    return name if name is None or len(name) <= MODEL_NAME_MAX else name[:MODEL_NAME_MAX] + "…"


def _wall_clock() -> int:
    return time.time_ns() // 1_000_000


def _price_version(rules: PriceRules) -> str:
    try:
        stamp = f"genai-prices/{version('genai-prices')}"
    except PackageNotFoundError:  # frozen builds carry no metadata
        stamp = "genai-prices/unknown"
    if not rules.models:
        return stamp
    text = "\n".join(
        f"{name.lower()} {price.input} {price.output} {price.cached_input} {price.cache_write} {price.request}"
        for name, price in sorted(rules.models.items())
    )
    return f"{stamp}+overrides-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


# ---------------------------------------------------------------- how much a model writes


@dataclass(frozen=True, slots=True)
class OutputLimit:
    """How many tokens a model may write at most, and whether it bills some that the caller never sees."""

    max_output: int | None
    hidden_output: bool


# `genai-prices` knows context windows but no output limits, so these are ours, from the providers' model pages.
# The first pattern found in a name decides. Limits that a provider does not publish are set low enough to be
# accepted: a cap above the real one is an error, one below it only shortens very long answers. Where prompt and
# answer share a small window (GPT-4 of 8k, the old completions models) the limit leaves room for a prompt.
_OUTPUT_LIMITS: tuple[tuple[str, int | None, bool], ...] = (
    (r"embed|rerank|moderation|whisper|transcribe|\btts\b|-tts|voyage-", None, False),
    (r"gpt-image|chatgpt-image|dall-e", 8_192, False),
    # OpenAI
    (r"\bo1-mini", 65_536, True),
    (r"\bo1-preview", 32_768, True),
    (r"\bo[1345](-|$|\b)|codex-mini", 100_000, True),
    (r"gpt-5(\.\d+)?-chat|gpt-chat-latest", 16_384, False),
    (r"gpt-oss", 32_768, True),
    (r"gpt-([5-9]|\d\d)", 128_000, True),
    (r"gpt-4\.1", 32_768, False),
    (r"gpt-4\.5", 16_384, False),
    (r"realtime", 4_096, False),
    (r"gpt-4o-2024-05-13", 4_096, False),
    (r"gpt-4o|gpt-audio", 16_384, False),
    (r"gpt-4|gpt-3\.5-turbo(?!-instruct)|gpt-35-turbo(?!-instruct)", 4_096, False),
    (r"gpt-3|davinci|curie|babbage|\bada\b", 2_048, False),
    # Anthropic: `max_tokens` bounds thinking too, which is off unless asked for, up to the fifth generation
    (r"claude-(v?[12]\b|instant)|claude-v", 4_096, False),
    (r"claude-3-5|claude-3\.5", 8_192, False),
    (r"claude-3-7|claude-3\.7", 64_000, False),
    (r"claude-3", 4_096, False),
    (r"claude-(opus-4(-0|-1|\.1|-2025|@|$)|4-opus)", 32_000, False),
    (r"claude-(sonnet-4(-0|-2025|@|$)|4-sonnet|(opus|sonnet|haiku)-4[-.]5)", 64_000, False),
    (r"claude-(opus|sonnet|haiku)-4", 128_000, False),
    (r"claude", 128_000, True),
    # Google: thinking counts against the cap and is billed
    (r"gemini-1|gemini-pro(-vision)?$|gemini-(pro|flash)-1", 8_192, False),
    (r"gemini-2\.0-flash-thinking", 65_535, True),
    (r"gemini-2\.0", 8_192, False),
    (r"gemini-2\.5-flash-image", 32_768, False),
    (r"gemini", 65_535, True),
    (r"gemma", 8_192, False),
    # Others
    (r"deepseek.*(chat|v2|v3(?!\.))", 8_192, False),
    (r"deepseek", 32_768, True),
    (r"grok-(1|2|3(?!-mini)|beta|vision)", 16_384, False),
    (r"grok", 32_768, True),
    (r"magistral", 32_768, True),
    (r"mi(s|ni)tral|mixtral|codestral|devstral|pixtral|voxtral", 16_384, False),
    (r"reason|think|\bqwq|-r1\b|deep-research", 32_768, True),
    (r"command-a", 8_192, False),
    (r"command|aya-", 4_096, False),
    (r"nova-2", 65_535, True),
    (r"nova-(micro|lite|pro|premier)", 10_000, False),
    (r"titan", 3_072, False),
    (r"llama", 8_192, False),
    (r"sonar", 8_192, False),
    (r"qwen-?(1|2)|jamba|granite|phi-[1234]", 8_192, False),
)
_UNKNOWN_LIMIT = OutputLimit(16_384, True)
_PATTERNS = tuple((re.compile(p), OutputLimit(most, hidden)) for p, most, hidden in _OUTPUT_LIMITS)


def limits_of(model: str | None) -> OutputLimit:
    """A model's output limit by its name. Unknown models get a modest one, and are taken to reason."""
    if not model or len(model) > MODEL_NAME_MAX:
        return _UNKNOWN_LIMIT
    name = model.lower()
    return next((limit for pattern, limit in _PATTERNS if pattern.search(name)), _UNKNOWN_LIMIT)

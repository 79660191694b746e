"""The outcome of the demo, for a newcomer to read: 100 columns, with colours on a terminal and plain elsewhere."""

from __future__ import annotations

import textwrap
from pathlib import Path

from llm_guard_mw.cli.demo.crowd import Answer
from llm_guard_mw.cli.demo.outcome import Outcome, Sold, total_nanos
from llm_guard_mw.cli.output import console, show_table, visible
from llm_guard_mw.logs import dollars

WIDTH = 96

#: Of a 429, what says something; the rest is plain HTTP.
_TELLING = ("content-type", "retry-after", "x-should-retry", "ratelimit", "ratelimit-policy")

THREE_LINES = """\
from llm_guard_mw import GuardMiddleware, capture

app.add_middleware(GuardMiddleware, config="llm_guard.toml")
client = capture(AsyncOpenAI())  # or AsyncAnthropic(), genai.Client(), ..."""


def show(outcome: Outcome, kept: Path | None = None) -> None:
    callers = {answer.person for answer in outcome.answers}
    tenants = {person.tenant for person in callers}
    _say(
        f"{_some(outcome.calls, 'request')} by {_some(len(callers), 'caller')} of {_some(len(tenants), 'tenant')}"
        f" in {outcome.seconds:.1f} s:"
        f" {outcome.statuses[200]} answered, {outcome.statuses[429]} refused.",
        style="bold",
    )
    _say("A stand-in plays OpenAI, Anthropic and Gemini: no key was used, nothing left this machine.")
    _show_spent(outcome)
    _show_refusals(outcome)
    sample = outcome.sample()
    if sample is not None:
        _show_sample(sample)
    _show_books(outcome)
    _show_way_on(kept)


def _show_spent(outcome: Outcome) -> None:
    _title("Who spent what")
    columns = ("tenant", "user", "feature", "model", "calls", "input_tokens", "output_tokens", "cost_usd")
    rows = sorted(outcome.spent, key=lambda row: (row["tenant"], row["user"], -(row["cost_nanos"] or 0)))
    show_table([_heading(name) for name in columns], [[row[name] for name in columns] for row in rows])


def _heading(name: str) -> str:
    return {"input_tokens": "input", "output_tokens": "output", "cost_usd": "cost"}.get(name, name)


def _show_refusals(outcome: Outcome) -> None:
    _title("Who was refused, and why")
    rows = [
        (row["user"], row["feature"], row["limit"], row["code"], row["times"], _wait(row["retry_after"]))
        for row in outcome.refusals()
    ]
    if rows:
        show_table(("user", "feature", "limit", "code", "times", "try again in"), rows)
    else:
        _say("Nobody: so few calls spend no budget.")


def _wait(seconds: int | None) -> str | None:
    if seconds is None:
        return None
    if seconds >= 2 * 86_400:
        return f"{seconds // 86_400} days"
    return f"{seconds // 3600} h" if seconds >= 3600 else f"{seconds} s"


def _show_sample(answer: Answer) -> None:
    _title("One of these refusals, as its caller got it")
    _say(f"HTTP/1.1 {answer.status} {answer.reason}")
    for name, value in answer.headers:
        if name.lower() in _TELLING or name.lower().startswith("x-llm-guard-"):
            _say(_wrapped(f"{name}: {visible(value)}"))
    problem = answer.problem()
    _say("")
    for name in ("detail", "code", "reset_at", "limit"):
        _say(_wrapped(f"{name}: {visible(str(problem[name]))}"))


def _wrapped(line: str) -> str:
    return textwrap.fill(line, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _show_books(outcome: Outcome) -> None:
    _title("Do the books add up? (in nano-dollars)")
    nobody = Sold()
    lists = [
        (model, outcome.provider.get(model, nobody), outcome.books.get(model, nobody))
        for model in sorted({*outcome.provider, *outcome.books})
    ]
    show_table(
        ("model", "calls", "input", "of it cached", "output", "provider's list", "our books"),
        [(model, *_figures(served), served.cost_nanos, booked.cost_nanos) for model, served, booked in lists],
    )
    for model, served, booked in lists:
        if served != booked:
            _bad(f"{model}: the provider has {served}, we have {booked}.")
    served_nanos, booked_nanos = total_nanos(outcome.provider), total_nanos(outcome.books)
    if outcome.equal:
        _good(f"What the provider says it served equals our books to the nano-dollar: {_money(booked_nanos)}.")
    else:
        _bad(f"The provider's list comes to {_money(served_nanos)}, our books to {_money(booked_nanos)}.")
    found = outcome.verification
    if found.ok:
        _good(f"verify: balances, holds, rows and sums agree; drift none, {_some(found.open_holds, 'open hold')}.")
    else:
        _bad(f"verify: {len(found.findings)} findings, drift {_money(found.drift_nanos)}.")
    if not outcome.complete:
        _bad(f"Not every request was answered or refused and booked once: {dict(outcome.statuses)}.")


def _figures(sold: Sold) -> tuple[int, int, int, int]:
    return sold.requests, sold.input_tokens, sold.cached_tokens, sold.output_tokens


def _money(nanos: int) -> str:
    return f"${dollars(nanos)}"


def _some(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _show_way_on(kept: Path | None) -> None:
    _title("Your own app")
    for line in THREE_LINES.splitlines():
        _say(f"    {line}" if line else "")
    _say("")
    _say("llm-guard-mw init writes an llm_guard.toml to start with; the app of this demo is examples/fastapi_app.")
    if kept is not None:
        _say(f"The books of this demo are in {kept}: run llm-guard-mw report --by user there.")


# ---------------------------------------------------------------- lines


def _title(text: str) -> None:
    _say("")
    _say(text, style="bold cyan")


def _good(text: str) -> None:
    _say(text, style="green")


def _bad(text: str) -> None:
    _say(text, style="bold red")


def _say(text: str, style: str = "") -> None:
    console().print(text, style=style, markup=False, soft_wrap=True)

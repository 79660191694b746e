"""JSON lines about calls: who, what, tokens, cost, decision, what is left, how long. Never a body, never a key.

The library configures nobody's logging. A host that has configured structlog gets our events in its own
processors; otherwise each event is one JSON object, given as the message to the standard logger `llm_guard`,
so that the host's handlers and levels decide where it goes. `configure` is for our own command line.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import orjson
import structlog

from llm_guard_mw.model import NANOS_PER_DOLLAR

if TYPE_CHECKING:
    from llm_guard_mw.call import Call

NAME = "llm_guard"

_standard = logging.getLogger(NAME)


def _dumps(event: Any, **_: Any) -> str:
    return orjson.dumps(event, default=str, option=orjson.OPT_NON_STR_KEYS).decode("utf-8", "replace")


_PROCESSORS: list[structlog.typing.Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.format_exc_info,
    structlog.processors.JSONRenderer(serializer=_dumps),
]

_json: structlog.stdlib.BoundLogger = structlog.wrap_logger(
    _standard, processors=_PROCESSORS, wrapper_class=structlog.stdlib.BoundLogger, cache_logger_on_first_use=True
)


class _Log:
    """Chooses at each event, since a host may configure structlog after it has imported us."""

    def enabled(self, level: int) -> bool:
        return structlog.is_configured() or _standard.isEnabledFor(level)

    def debug(self, event: str, **fields: Any) -> None:
        if self.enabled(logging.DEBUG):
            self._logger().debug(event, **fields)

    def info(self, event: str, **fields: Any) -> None:
        if self.enabled(logging.INFO):
            self._logger().info(event, **fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._logger().warning(event, **fields)

    def error(self, event: str, **fields: Any) -> None:
        self._logger().error(event, **fields)

    def exception(self, event: str, **fields: Any) -> None:
        """An error of ours, with its traceback; local variables (which may hold bodies) are never shown."""
        self._logger().error(event, exc_info=True, **fields)

    def _logger(self) -> Any:  # whatever class the host has configured
        return structlog.get_logger(NAME) if structlog.is_configured() else _json


log = _Log()


def configure(level: int = logging.INFO) -> None:
    """JSON lines on standard error, ours and everybody's: for processes that are ours."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_PROCESSORS[:-1],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _PROCESSORS[-1]],
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)
    plain = logging.StreamHandler(sys.stderr)
    plain.setFormatter(logging.Formatter("%(message)s"))
    _standard.handlers = [plain]
    _standard.propagate = False


# ---------------------------------------------------------------- the events of a call


def log_call(call: Call, status: int | None) -> None:
    """The one line that a call leaves."""
    if not log.enabled(logging.INFO):
        return
    events = call.events
    fields: MutableMapping[str, Any] = {
        **_who(call),
        "decision": "reject" if call.refusal is not None and not call.events else call.decision,
        "exchanges": len(events),
        "models": sorted({event.model for event in events if event.model}),
        "input_tokens": _sum([event.input_tokens for event in events]),
        "output_tokens": _sum([event.output_tokens for event in events]),
        "cost_usd": dollars(call.cost_nanos),
        "basis": sorted({event.basis for event in events if event.basis}),
        "left": _left(call),
        "duration_ms": call.age_ms(),
        "first_token_ms": next((e.first_token_ms for e in events if e.first_token_ms is not None), None),
        "status": status,
    }
    if call.refusal is not None:
        fields["refused"] = call.refusal.code
        fields["limit"] = call.refusal.shortfalls[0].limit if call.refusal.shortfalls else None
    if call.outcomes:
        fields["outcomes"] = dict(call.outcomes)
    if not call.identified or call.principal.anonymous:
        fields["unattributed"] = True
    if call.alone:
        fields["alone"] = True
    if call.unguarded:
        fields["unguarded"] = True
    if call.would_refuse is not None:
        fields["would_refuse"] = call.would_refuse.code
        fields["limit"] = call.would_refuse.shortfalls[0].limit if call.would_refuse.shortfalls else None
    log.info("call", **fields)


def _who(call: Call) -> Mapping[str, Any]:
    return {
        "call_id": call.id,
        "parent_call_id": call.parent_id,
        "tenant": call.principal.tenant,
        "user": call.principal.user,
        "tier": call.principal.tier,
        "feature": call.feature,
        "route": call.route.name if call.route is not None else None,
        "workflow_id": call.tags.workflow_id,
    }


def _left(call: Call) -> dict[str, int]:
    """Each limit's remainder as last seen, in its own unit (nano-dollars for USD)."""
    return {
        slug: max(0, limit.ceiling() - standing.spent - standing.held)
        for slug, (limit, standing) in list(call.standings.items())
    }


def _sum(numbers: list[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def dollars(nanos: int | None) -> str | None:
    """Nano-dollars as an exact decimal: 1_500_000 is "0.0015"."""
    if nanos is None:
        return None
    sign, nanos = ("-", -nanos) if nanos < 0 else ("", nanos)
    whole, fraction = divmod(nanos, NANOS_PER_DOLLAR)
    return f"{sign}{whole}.{fraction:09d}".rstrip("0").rstrip(".")

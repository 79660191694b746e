"""What a wire format has to tell the meter, and the small things that all of them read alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec

from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage

#: A count beyond this is not exact in a double, and no provider's.
_COUNT_MAX = 2**53
_NAME_MAX = 256
_CODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,63}\Z")


@dataclass(slots=True)
class Notes:
    """What has been read of one answer so far. Documents are noted in the order they came."""

    provider: str | None = None
    usage: Doc | None = None  # the provider's own object, merged where its protocol asks for that
    usage_final: bool = False  # not a running count
    ended: bool = False  # the protocol's end mark was seen
    pending: bool = False  # the provider is still at work, and this is only a report
    model: str | None = None
    response_id: str | None = None
    service_tier: str | None = None
    error: str | None = None
    parts: dict[str, int] | None = None  # what is billed by the piece and stands outside of the usage object

    def identify(self, *, model: Any, response_id: Any, service_tier: Any = None) -> None:
        """Keep the names that are there; a first chunk may well have empty ones."""
        self.model = name_of(model) or self.model
        self.response_id = name_of(response_id) or self.response_id
        self.service_tier = name_of(service_tier) or self.service_tier


@dataclass(frozen=True, slots=True)
class Dialect:
    """One wire format. All four take foreign JSON and must stand any shape of it.

    `recognises` says whether a document is of this format; `note` writes down what a document says beside the
    text; `usage` reads the noted usage object; `text` gives the pieces that the model wrote in a document.
    """

    name: str
    recognises: Callable[[Doc], bool]
    note: Callable[[Doc, Notes], None]
    usage: Callable[[Doc, Notes], Usage | None]
    text: Callable[[Doc], Iterator[str]]


# ---------------------------------------------------------------- reading foreign JSON


def count_of(value: Any) -> int | None:
    """A number of tokens: a whole number, not negative, in range. Anything else was not said."""
    if type(value) is int:
        return value if 0 <= value <= _COUNT_MAX else None
    if type(value) is float and value.is_integer():
        return int(value) if 0 <= value <= _COUNT_MAX else None
    return None


def first_count(*values: Any) -> int | None:
    """The first of these that is a count."""
    for value in values:
        count = count_of(value)
        if count is not None:
            return count
    return None


def total_of(*counts: int | None) -> int | None:
    """The sum of what was said; None if nothing was."""
    said = [count for count in counts if count is not None]
    return count_of(sum(said)) if said else None


def object_of(value: Any) -> Doc:
    """The object, or an empty one where something else stands."""
    return value if isinstance(value, dict) else {}


def objects_of(value: Any) -> Iterator[Doc]:
    """The objects of a list; nothing of anything else."""
    if isinstance(value, list):
        for item in value:
            if isinstance(item, dict):
                yield item


def name_of(value: Any) -> str | None:
    """A model's name, an id: a string of bearable length that is not empty."""
    return value if isinstance(value, str) and 0 < len(value) <= _NAME_MAX else None


def text_of(*values: Any) -> Iterator[str]:
    """Those of the values that are text."""
    for value in values:
        if isinstance(value, str) and value:
            yield value


def json_text(value: Any) -> str:
    """Parsed arguments as the model wrote them, near enough to be counted."""
    try:
        return msgspec.json.encode(value).decode()
    except (ValueError, RecursionError):
        return ""


def error_of(value: Any) -> str | None:
    """A short name for the error that stands here; None where none does.

    Never the message: it may quote the prompt.
    """
    if not value:
        return None
    error = object_of(value)
    for code in (error.get("code"), error.get("status"), error.get("type")):
        if isinstance(code, int) and not isinstance(code, bool):
            code = str(code)
        if isinstance(code, str) and _CODE.match(code):
            return code
    return "error"


def says_something(usage: Doc) -> bool:
    """Whether a usage object holds any number. Some streams send an empty one, or one with nothing but a label."""
    return any(count_of(value) is not None for value in usage.values())


def frozen_parts(parts: Mapping[str, int | None]) -> Mapping[str, int]:
    """The parts that were said."""
    return MappingProxyType({name: count for name, count in parts.items() if count is not None})


# ---------------------------------------------------------------- tools that the provider runs and bills by use

#: Their names on the wire, and ours in `Usage.parts`.
TOOL_PARTS = {
    "web_search_requests": "web_searches",
    "web_search_calls": "web_searches",
    "web_search_call": "web_searches",
    "num_search_queries": "web_searches",
    "web_fetch_requests": "web_fetches",
    "x_search_calls": "x_searches",
    "file_search_calls": "file_searches",
    "file_search_call": "file_searches",
    "document_search_calls": "document_searches",
    "code_interpreter_calls": "code_executions",
    "code_interpreter_call": "code_executions",
    "code_execution_requests": "code_executions",
    "image_generation_calls": "image_generations",
    "image_generation_call": "image_generations",
    "mcp_calls": "mcp_calls",
    "mcp_call": "mcp_calls",
    "num_sources_used": "sources",
}


def tool_parts(counts: Doc) -> dict[str, int]:
    """The uses of server tools that an object of counters tells of."""
    parts: dict[str, int] = {}
    for name, value in counts.items():
        part, count = TOOL_PARTS.get(name), count_of(value)
        if part is not None and count is not None:
            parts[part] = max(count, parts.get(part, 0))
    return parts

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
#: Nobody writes into what `object_of` gives.
_EMPTY: Doc = {}
_CODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,63}\Z")


class Notes(msgspec.Struct):
    """What has been read of one answer so far. Documents are noted in the order they came."""

    provider: str | None = None
    model: str | None = None
    usage: Doc | None = None  # the provider's own object, merged where its protocol asks for that
    usage_final: bool = False  # not a running count
    ended: bool = False  # the protocol's end mark was seen
    pending: bool = False  # the provider is still at work, and this is only a report
    response_id: str | None = None
    service_tier: str | None = None
    error: str | None = None
    parts: dict[str, int] | None = None  # what is billed by the piece and stands outside of the usage object
    background: bool = False  # the provider works on after its answer, so that the usage comes with a later one

    def identify(self, model: Any, response_id: Any, service_tier: Any = None) -> None:
        """Keep the names that are there; a first chunk may well have empty ones."""
        if model is not None:
            self.model = name_of(model) or self.model
        if response_id is not None:
            self.response_id = name_of(response_id) or self.response_id
        if service_tier is not None:
            self.service_tier = name_of(service_tier) or self.service_tier


@dataclass(frozen=True, slots=True, eq=False)
class Dialect:
    """One wire format. All four functions take foreign JSON and must stand any shape of it.

    `members` are names of which every document of the format has one, so that most formats can be passed over
    quickly; `recognises` says whether a document is of this format; `note` writes down what a document says beside
    the text; `usage` reads the noted usage object; `text` gives the pieces that the model wrote in a document.
    """

    name: str
    members: frozenset[str]
    recognises: Callable[[Doc], bool]
    note: Callable[[Doc, Notes], None]
    usage: Callable[[Doc, Notes], Usage | None]
    text: Callable[[Doc], Iterator[str]]


def no_text(doc: Doc) -> Iterator[str]:
    """Of answers that no model writes."""
    return iter(())


# ---------------------------------------------------------------- reading foreign JSON


def count_of(value: Any) -> int | None:
    """A number of tokens: a whole number, not negative, in range. Anything else was not said."""
    if value is None:
        return None
    kind = type(value)
    if kind is int:
        return value if 0 <= value <= _COUNT_MAX else None
    if kind is float and value.is_integer():
        return int(value) if 0 <= value <= _COUNT_MAX else None
    return None


def rounded_up(value: Any) -> int | None:
    """A number of seconds, which may well be broken: the whole ones that hold it."""
    if type(value) is float and 0 <= value <= _COUNT_MAX:
        return -int(-value // 1)
    return count_of(value)


def first_count(*values: Any) -> int | None:
    """The first of these that is a count."""
    for value in values:
        count = count_of(value)
        if count is not None:
            return count
    return None


def total_of(*counts: int | None) -> int | None:
    """The sum of what was said; None if nothing was."""
    total = None
    for count in counts:
        if count is not None:
            total = count if total is None else total + count
    return count_of(total)


def object_of(value: Any) -> Doc:
    """The object, or an empty one where something else stands."""
    return value if isinstance(value, dict) else _EMPTY


def either(doc: Doc, camel: str, snake: str) -> Any:
    """A member under the one name or the other: what an SDK has parsed and dumped again has `snake_case` names."""
    value = doc.get(camel)
    return doc.get(snake) if value is None else value


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
    for value in usage.values():  # noqa: SIM110 - a generator costs more than all the rest of this
        if count_of(value) is not None:
            return True
    return False


#: What most answers have.
NO_PARTS: Mapping[str, int] = MappingProxyType({})


def frozen_parts(parts: Mapping[str, int | None]) -> Mapping[str, int]:
    """The parts that were said."""
    said = {name: count for name, count in parts.items() if count is not None}
    return MappingProxyType(said) if said else NO_PARTS


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
    # Gemini's interactions and Mistral's connectors name the tool itself.
    "google_search": "web_searches",
    "google_maps": "map_searches",
    "retrieval": "document_searches",
    "web_search": "web_searches",
    "web_search_premium": "web_searches",
    "code_interpreter": "code_executions",
    "image_generation": "image_generations",
    "document_library": "document_searches",
}


def tool_parts(counts: Doc) -> dict[str, int]:
    """The uses of server tools that an object of counters tells of."""
    parts: dict[str, int] = {}
    if TOOL_PARTS.keys().isdisjoint(counts):
        return parts
    for name, value in counts.items():
        part, count = TOOL_PARTS.get(name), count_of(value)
        if part is not None and count is not None:
            parts[part] = max(count, parts.get(part, 0))
    return parts

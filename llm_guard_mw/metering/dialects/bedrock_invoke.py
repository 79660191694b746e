"""Bedrock's InvokeModel: every maker's model in its maker's own format.

Claude, Nova, Cohere, Jamba and others speak formats that have a file of their own, and are known by their bodies.
Here are those that exist only there: Amazon's Titan, Meta's Llama, and Mistral's and AI21's oldest.

Whatever the format: what the body leaves out is in the metrics that Bedrock adds to the last chunk of a stream, or in
the headers of an answer that is none (`counted_by_bedrock`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from llm_guard_mw.metering.dialects.dialect import (
    Dialect,
    Notes,
    count_of,
    error_of,
    first_count,
    object_of,
    objects_of,
    says_something,
    text_of,
    total_of,
)
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage

METRICS: Final = "amazon-bedrock-invocationMetrics"
#: What Bedrock counts, under the names of its metrics, and the headers that say the same.
_HEADERS: Final[Mapping[str, str]] = {
    "inputTokenCount": "x-amzn-bedrock-input-token-count",
    "outputTokenCount": "x-amzn-bedrock-output-token-count",
    "cacheReadInputTokenCount": "x-amzn-bedrock-cache-read-input-token-count",
    "cacheWriteInputTokenCount": "x-amzn-bedrock-cache-write-input-token-count",
}
HEADER_PREFIX: Final = "x-amzn-bedrock-"
_DIGITS_MAX = 16

_TITAN = ("inputTextTokenCount", "totalOutputTextTokenCount")
_LLAMA = ("prompt_token_count", "generation_token_count")
_MEMBERS = frozenset({*_TITAN, *_LLAMA, "outputText", "generation", "outputs"})


def _recognises(doc: Doc) -> bool:
    if any(name in doc for name in (*_TITAN, *_LLAMA)):
        return True
    if isinstance(doc.get("outputText"), str) or isinstance(doc.get("generation"), str):
        return True
    return isinstance(next(objects_of(doc.get("outputs")), object_of(None)).get("text"), str)


def _note(doc: Doc, notes: Notes) -> None:
    results = list(objects_of(doc.get("results")))
    # A chunk that leaves a count out says nothing about it.
    said: Doc = {name: count for name in (*_TITAN, *_LLAMA) if (count := count_of(doc.get(name))) is not None}
    wrote = total_of(*(count_of(result.get("tokenCount")) for result in results))
    if wrote is not None:
        said["totalOutputTextTokenCount"] = wrote
    over = bool(doc.get("completionReason") or doc.get("stop_reason") or "results" in doc or "embedding" in doc)
    over = over or METRICS in doc
    notes.ended = notes.ended or over
    if says_something(said):
        notes.usage = {**(notes.usage or {}), **said}
        notes.usage_final = over
    notes.error = error_of(doc.get("error")) or notes.error


def _usage(usage: Doc, notes: Notes) -> Usage | None:
    return Usage(
        input_tokens=first_count(usage.get("inputTextTokenCount"), usage.get("prompt_token_count")),
        output_tokens=first_count(usage.get("totalOutputTextTokenCount"), usage.get("generation_token_count")),
        model=notes.model,
    )


def _text(doc: Doc) -> Iterator[str]:
    yield from text_of(doc.get("outputText"), doc.get("generation"))
    for result in (*objects_of(doc.get("results")), *objects_of(doc.get("outputs"))):
        yield from text_of(result.get("outputText"), result.get("text"))


BEDROCK_INVOKE = Dialect("bedrock.invoke", _MEMBERS, _recognises, _note, _usage, _text)


# ---------------------------------------------------------------- what Bedrock counts itself


def metrics_in(docs: Iterable[Doc]) -> Doc | None:
    """The metrics of a stream's last chunk, which say that it is the last."""
    for doc in docs:
        if METRICS in doc:
            return object_of(doc[METRICS])
    return None


def count_headers(api: str | None, headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str] | None:
    """Of an answer's headers those that count, for a meter; None of any other api's, which has none."""
    if api is None or not api.startswith("bedrock."):
        return None
    return {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in headers
        if name.lower().startswith(HEADER_PREFIX.encode())
    }


def counts_in(headers: Mapping[str, str]) -> Doc:
    """The counts in an answer's headers, under the names of the metrics."""
    counts: Doc = {}
    found = {name.lower(): value for name, value in headers.items() if name.lower().startswith(HEADER_PREFIX)}
    for name, header in _HEADERS.items():
        value: Any = found.get(header)
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= _DIGITS_MAX:
            counts[name] = int(value)
    return counts


def counted_by_bedrock(usage: Usage | None, counts: Doc, model: str | None) -> Usage | None:
    """`usage` with what it does not say itself filled in. Input and cache belong together, as they do in a body."""
    cached = count_of(counts.get("cacheReadInputTokenCount"))
    written = count_of(counts.get("cacheWriteInputTokenCount"))
    prompt = total_of(count_of(counts.get("inputTokenCount")), cached, written)
    output = count_of(counts.get("outputTokenCount"))
    if usage is None:
        if prompt is None and output is None:
            return None
        return Usage(prompt, output, cached, written, model=model)
    if usage.input_tokens is None and prompt is not None:
        usage = replace(usage, input_tokens=prompt, cached_input_tokens=cached, cache_write_tokens=written)
    if usage.output_tokens is None and output is not None:
        usage = replace(usage, output_tokens=output)
    return usage

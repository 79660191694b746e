"""The token counts of OpenAI's formats, and where the providers that speak them differ.

All of OpenAI's own are inclusive: `prompt_tokens` contains the cached ones, `completion_tokens` the reasoning. Others
leave something out, and then `total_tokens` often proves it:

    total = prompt + completion + reasoning     xAI, also through Azure: reasoning stands beside the completion
    total = prompt + completion + audio         Mistral: audio stands beside the prompt
    total = prompt + completion + cache         gateways that pass Anthropic's counts on in this shape
    total = prompt + completion + connectors    Mistral's conversations: what their tools read stands beside it, too
    total > prompt + completion                 Gemini's compatible endpoint: the rest was thought
    total = prompt + completion, all the same   Vercel's gateway leaves reasoning out of both; its cost proves that
"""

from __future__ import annotations

from collections.abc import Mapping

from llm_guard_mw.metering.dialects.dialect import (
    NO_PARTS,
    TOOL_PARTS,
    Notes,
    count_of,
    first_count,
    frozen_parts,
    object_of,
    rounded_up,
    tool_parts,
    total_of,
)
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage

_GOOGLE = ("google", "vertex")
#: Where the counters of tools stand that are run by the provider.
_TOOLS = ("server_tool_use", "server_tool_use_details", "server_side_tool_usage_details", "connectors")
_SECONDS = ("prompt_audio_seconds", "seconds")
#: Members of a usage object, and of its details, that make `parts`. Most have none of them.
_WITH_PARTS = frozenset((*TOOL_PARTS, *_TOOLS, *_SECONDS, "citation_tokens"))


def read_tokens(usage: Doc, notes: Notes, *, output_follows: bool = True) -> Usage | None:
    """The inclusive totals of a usage object. `output_follows`: what is missing can be told from the total."""
    said = usage.get
    asked, wrote = _asked(usage), _wrote(usage)
    total = count_of(said("total_tokens"))
    prompt = count_of(said("prompt_tokens"))
    if prompt is None:
        prompt = _prompt_elsewhere(usage)
    completion = count_of(said("completion_tokens"))
    if completion is None:
        completion = count_of(said("output_tokens"))
    reasoning = count_of(wrote.get("reasoning_tokens"))
    if reasoning is None:
        reasoning = count_of(said("reasoning_tokens"))
    audio = count_of(asked.get("audio_tokens"))
    cached = count_of(asked.get("cached_tokens"))
    if cached is None:
        cached = _cached_elsewhere(usage)
    written = count_of(asked.get("cache_write_tokens"))
    if written is None:
        written = _written_elsewhere(usage, asked)
    parts = _parts(usage, asked, wrote, notes)
    if prompt is None and completion is None and total is None and not parts:
        return None

    if completion is None and output_follows and prompt is not None and total is not None and total >= prompt:
        completion = total - prompt
    if prompt is not None and completion is not None:
        left = None if total is None else total - prompt - completion
        if left and left in (audio, count_of(said("connector_tokens"))):
            prompt += left
        elif reasoning and (left == reasoning or _leaves_reasoning_out(usage, notes, left)):
            completion = count_of(completion + reasoning)
        elif left and left == _anthropics_cache(usage):
            prompt += left
        elif left and left > 0 and _is_gemini(notes):
            reasoning = reasoning or left
            completion += left
    return Usage(
        prompt,
        completion,
        cached,
        written,
        reasoning,
        audio,
        count_of(wrote.get("audio_tokens")),
        notes.model,
        True,
        parts,
    )


def _prompt_elsewhere(usage: Doc) -> int | None:
    """Under Responses' name, or in DeepSeek's two halves."""
    prompt = count_of(usage.get("input_tokens"))
    if prompt is not None:
        return prompt
    return total_of(count_of(usage.get("prompt_cache_hit_tokens")), count_of(usage.get("prompt_cache_miss_tokens")))


def _asked(usage: Doc) -> Doc:
    for name in ("prompt_tokens_details", "input_tokens_details", "input_token_details", "prompt_token_details"):
        details = usage.get(name)
        if isinstance(details, dict) and details:
            return details
    return object_of(None)


def _wrote(usage: Doc) -> Doc:
    for name in ("completion_tokens_details", "output_tokens_details", "output_token_details"):
        details = usage.get(name)
        if isinstance(details, dict):
            return details
    return object_of(None)


def _cached_elsewhere(usage: Doc) -> int | None:
    return first_count(
        usage.get("cached_tokens"),
        usage.get("num_cached_tokens"),
        usage.get("prompt_cache_hit_tokens"),
        usage.get("cache_read_input_tokens"),
    )


def _written_elsewhere(usage: Doc, asked: Doc) -> int | None:
    if "cache_creation_tokens" not in asked and "cache_creation_input_tokens" not in usage:
        return None
    return first_count(asked.get("cache_creation_tokens"), usage.get("cache_creation_input_tokens"))


def _anthropics_cache(usage: Doc) -> int | None:
    return total_of(count_of(usage.get("cache_read_input_tokens")), count_of(usage.get("cache_creation_input_tokens")))


def _leaves_reasoning_out(usage: Doc, notes: Notes, left: int | None) -> bool:
    """Whether reasoning is not in the completion, though no total proves it. `left` is what the total leaves."""
    if notes.provider == "xai":
        return left != 0
    # `market_cost` is in no other gateway's usage.
    return notes.provider == "vercel-gateway" or "market_cost" in usage


def _is_gemini(notes: Notes) -> bool:
    """Whoever passes it on, the model says so; and Google's endpoint serves nothing else that thinks unseen."""
    return notes.provider in _GOOGLE or (notes.model or "").rpartition("/")[2].startswith("gemini")


def _parts(usage: Doc, asked: Doc, wrote: Doc, notes: Notes) -> Mapping[str, int]:
    images = "image_tokens" in asked or "image_tokens" in wrote
    if notes.parts is None and not images and _WITH_PARTS.isdisjoint(usage):
        return NO_PARTS
    parts: dict[str, int | None] = {**tool_parts(usage), **(notes.parts or {})}
    for tools in _TOOLS:
        parts |= tool_parts(object_of(usage.get(tools)))
    parts["seconds"] = next(
        (seconds for name in _SECONDS if (seconds := rounded_up(usage.get(name))) is not None),
        None,
    )
    parts["citation_tokens"] = count_of(usage.get("citation_tokens"))
    parts["image_input_tokens"] = count_of(asked.get("image_tokens")) or None
    parts["image_output_tokens"] = count_of(wrote.get("image_tokens")) or None
    return frozen_parts(parts)

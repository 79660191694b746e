"""The token counts of OpenAI's formats, and where the providers that speak them differ.

All of OpenAI's own are inclusive: `prompt_tokens` contains the cached ones, `completion_tokens` the reasoning. Others
leave something out, and then `total_tokens` often proves it:

    total = prompt + completion + reasoning     xAI, also through Azure: reasoning stands beside the completion
    total = prompt + completion + audio         Mistral: audio stands beside the prompt
    total > prompt + completion                 Gemini's compatible endpoint: the rest was thought
    total = prompt + completion, all the same   Vercel's gateway leaves reasoning out of both; its cost proves that
"""

from __future__ import annotations

from llm_guard_mw.metering.dialects.dialect import (
    Notes,
    count_of,
    first_count,
    frozen_parts,
    object_of,
    tool_parts,
    total_of,
)
from llm_guard_mw.metering.loose_json import Doc
from llm_guard_mw.model import Usage

_GOOGLE = ("google", "vertex")


def read_tokens(usage: Doc, notes: Notes, *, output_follows: bool = True) -> Usage | None:
    """The inclusive totals of a usage object. `output_follows`: what is missing can be told from the total."""
    asked = _details(usage, "prompt_tokens_details", "input_tokens_details", "prompt_token_details")
    asked = asked or object_of(usage.get("input_token_details"))
    wrote = _details(usage, "completion_tokens_details", "output_tokens_details", "output_token_details")
    total = count_of(usage.get("total_tokens"))
    prompt = first_count(usage.get("prompt_tokens"), usage.get("input_tokens"))
    if prompt is None:  # DeepSeek's two halves
        prompt = total_of(
            count_of(usage.get("prompt_cache_hit_tokens")), count_of(usage.get("prompt_cache_miss_tokens"))
        )
    completion = first_count(usage.get("completion_tokens"), usage.get("output_tokens"))
    reasoning = first_count(wrote.get("reasoning_tokens"), usage.get("reasoning_tokens"))
    audio = count_of(asked.get("audio_tokens"))
    if prompt is None and completion is None and total is None:
        return None

    if completion is None and output_follows and prompt is not None and total is not None and total >= prompt:
        completion = total - prompt
    if prompt is not None and completion is not None:
        if audio and total == prompt + completion + audio:
            prompt += audio
        elif _hides_reasoning(usage, notes, prompt, completion, reasoning, total):
            completion += reasoning or 0
        elif total is not None and total > prompt + completion and _is_gemini(notes):
            reasoning = reasoning or total - prompt - completion
            completion = total - prompt

    parts: dict[str, int | None] = {**tool_parts(usage), **(notes.parts or {})}
    for tools in ("server_tool_use", "server_tool_use_details", "server_side_tool_usage_details"):
        parts |= tool_parts(object_of(usage.get(tools)))
    parts["seconds"] = first_count(usage.get("prompt_audio_seconds"), usage.get("seconds"))
    return Usage(
        input_tokens=count_of(prompt),
        output_tokens=count_of(completion),
        cached_input_tokens=first_count(
            asked.get("cached_tokens"),
            usage.get("cached_tokens"),
            usage.get("num_cached_tokens"),
            usage.get("prompt_cache_hit_tokens"),
            usage.get("cache_read_input_tokens"),
        ),
        cache_write_tokens=first_count(
            asked.get("cache_write_tokens"),
            asked.get("cache_creation_tokens"),
            usage.get("cache_creation_input_tokens"),
        ),
        reasoning_tokens=reasoning,
        audio_input_tokens=audio,
        audio_output_tokens=count_of(wrote.get("audio_tokens")),
        model=notes.model,
        parts=frozen_parts(parts),
    )


def _details(usage: Doc, *names: str) -> Doc:
    for name in names:
        details = usage.get(name)
        if isinstance(details, dict):
            return details
    return {}


def _hides_reasoning(
    usage: Doc, notes: Notes, prompt: int, completion: int, reasoning: int | None, total: int | None
) -> bool:
    """Whether the reasoning is left out of the completion."""
    if not reasoning:
        return False
    if total == prompt + completion + reasoning:
        return True
    if notes.provider == "xai":
        return total != prompt + completion
    # `market_cost` is in no other gateway's usage.
    return notes.provider == "vercel-gateway" or (notes.provider is None and "market_cost" in usage)


def _is_gemini(notes: Notes) -> bool:
    if notes.provider is None:
        return (notes.model or "").removeprefix("google/").startswith("gemini")
    return notes.provider in _GOOGLE

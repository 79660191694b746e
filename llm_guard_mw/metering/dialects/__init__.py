"""The wire formats that can be read, one file each. A new one is a file and an entry here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from llm_guard_mw.metering.dialects.anthropic_messages import ANTHROPIC_MESSAGES
from llm_guard_mw.metering.dialects.dialect import Dialect, Notes
from llm_guard_mw.metering.dialects.gemini_generate import GEMINI_GENERATE
from llm_guard_mw.metering.dialects.openai_chat import OPENAI_CHAT
from llm_guard_mw.metering.dialects.openai_completions import OPENAI_COMPLETIONS
from llm_guard_mw.metering.dialects.openai_embeddings import OPENAI_EMBEDDINGS
from llm_guard_mw.metering.dialects.openai_responses import OPENAI_RESPONSES

#: By the names of `api`. The order is the one in which an unknown body is tried: the most telling shapes first.
DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {
        "openai.responses": OPENAI_RESPONSES,
        "openai.responses.retrieve": OPENAI_RESPONSES,
        "openai.responses.compact": OPENAI_RESPONSES,
        "anthropic.messages": ANTHROPIC_MESSAGES,
        "gemini.generate": GEMINI_GENERATE,
        "openai.embeddings": OPENAI_EMBEDDINGS,
        "openai.completions": OPENAI_COMPLETIONS,
        "openai.chat": OPENAI_CHAT,
    }
)

__all__ = ["DIALECTS", "Dialect", "Notes"]

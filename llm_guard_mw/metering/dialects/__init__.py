"""The wire formats that can be read, one file each. A new one is a file and an entry here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from llm_guard_mw.metering.dialects.aleph_alpha import ALEPH_ALPHA_COMPLETE
from llm_guard_mw.metering.dialects.anthropic_complete import ANTHROPIC_COMPLETE
from llm_guard_mw.metering.dialects.anthropic_messages import ANTHROPIC_MESSAGES
from llm_guard_mw.metering.dialects.bedrock_converse import BEDROCK_CONVERSE
from llm_guard_mw.metering.dialects.bedrock_invoke import BEDROCK_INVOKE
from llm_guard_mw.metering.dialects.cohere import COHERE
from llm_guard_mw.metering.dialects.counting import COUNTING
from llm_guard_mw.metering.dialects.dialect import Dialect, Notes
from llm_guard_mw.metering.dialects.gemini_embed import GEMINI_EMBED
from llm_guard_mw.metering.dialects.gemini_generate import GEMINI_GENERATE
from llm_guard_mw.metering.dialects.gemini_interactions import GEMINI_INTERACTIONS
from llm_guard_mw.metering.dialects.huggingface import HUGGINGFACE_GENERATE
from llm_guard_mw.metering.dialects.mistral import MISTRAL_CONVERSATION, MISTRAL_OCR
from llm_guard_mw.metering.dialects.ollama import OLLAMA
from llm_guard_mw.metering.dialects.openai_chat import OPENAI_CHAT
from llm_guard_mw.metering.dialects.openai_completions import OPENAI_COMPLETIONS
from llm_guard_mw.metering.dialects.openai_embeddings import OPENAI_EMBEDDINGS
from llm_guard_mw.metering.dialects.openai_media import OPENAI_AUDIO, OPENAI_IMAGES
from llm_guard_mw.metering.dialects.openai_responses import OPENAI_RESPONSES
from llm_guard_mw.metering.dialects.vertex_predict import VERTEX_PREDICT
from llm_guard_mw.metering.dialects.watsonx import WATSONX_GENERATION
from llm_guard_mw.metering.loose_json import Doc

#: By the names of `api`. The order is the one in which an unknown body is tried: the most telling shapes first.
DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {
        "openai.count_tokens": COUNTING,
        "anthropic.count_tokens": COUNTING,
        "gemini.count_tokens": COUNTING,
        "bedrock.count_tokens": COUNTING,
        "cohere.tokenize": COUNTING,
        "cohere.chat.v1": COHERE,
        "cohere.chat.v2": COHERE,
        "cohere.classify": COHERE,
        "cohere.embed": COHERE,
        "cohere.generate": COHERE,
        "cohere.rerank": COHERE,
        "cohere.summarize": COHERE,
        "ollama.chat": OLLAMA,
        "ollama.embed": OLLAMA,
        "ollama.generate": OLLAMA,
        "gemini.interactions": GEMINI_INTERACTIONS,
        "gemini.interactions.retrieve": GEMINI_INTERACTIONS,
        "gemini.embed": GEMINI_EMBED,
        "vertex.predict": VERTEX_PREDICT,
        "mistral.ocr": MISTRAL_OCR,
        "mistral.conversation": MISTRAL_CONVERSATION,
        "watsonx.generation": WATSONX_GENERATION,
        "aleph-alpha.complete": ALEPH_ALPHA_COMPLETE,
        "huggingface.generate": HUGGINGFACE_GENERATE,
        "anthropic.complete": ANTHROPIC_COMPLETE,
        "bedrock.converse": BEDROCK_CONVERSE,
        "openai.images": OPENAI_IMAGES,
        "openai.audio": OPENAI_AUDIO,
        "openai.speech": OPENAI_AUDIO,
        "openai.responses": OPENAI_RESPONSES,
        "openai.responses.retrieve": OPENAI_RESPONSES,
        "openai.responses.compact": OPENAI_RESPONSES,
        "anthropic.messages": ANTHROPIC_MESSAGES,
        "gemini.generate": GEMINI_GENERATE,
        "openai.embeddings": OPENAI_EMBEDDINGS,
        "openai.completions": OPENAI_COMPLETIONS,
        "openai.chat": OPENAI_CHAT,
        "bedrock.invoke": BEDROCK_INVOKE,
    }
)
_IN_ORDER = tuple(dict.fromkeys(DIALECTS.values()))

#: Every format's documents have one of these members, and an app's own answer hardly ever does.
_TELLING = frozenset().union(*(dialect.members for dialect in _IN_ORDER))


#: What some formats call their documents themselves.
_BY_OBJECT = {
    "chat.completion": OPENAI_CHAT,
    "chat.completion.chunk": OPENAI_CHAT,
    "text_completion": OPENAI_COMPLETIONS,
    "response": OPENAI_RESPONSES,
    "interaction": GEMINI_INTERACTIONS,
}


def recognised(doc: Doc) -> Dialect | None:
    """The format of a document of which nobody said what it is."""
    kind = doc.get("object")
    if isinstance(kind, str) and kind in _BY_OBJECT:
        return _BY_OBJECT[kind]
    if _TELLING.isdisjoint(doc):
        return None
    for dialect in _IN_ORDER:
        if not dialect.members.isdisjoint(doc) and dialect.recognises(doc):
            return dialect
    return None


__all__ = ["COUNTING", "DIALECTS", "Dialect", "Notes", "recognised"]

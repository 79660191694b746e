"""What a request to a provider asks for, read off its bytes: the model, the cap, and an upper estimate of the input.

Rule 1: `describe` never raises. What it cannot read it says nothing about, and estimates from the size.
Rule 2: The whole body counts as input text, its JSON syntax included. That covers what providers put around
        messages and tools, and no field that is new to us can be missed.
Rule 3: Media in the places where providers take it counts by rule, not by its base64. In any other place the same
        bytes are text, to the provider as to us.
Rule 4: Where a request names a thing twice, the reading that costs more counts.

Nothing of a body is kept, and none of it is logged. docs/explanation/estimates.md has the bounds.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

import msgspec

from llm_guard_mw.media import BYTES_PER_AUDIO_TOKEN, Media, image_tokens, text_and_media
from llm_guard_mw.model import Asked
from llm_guard_mw.rewriting import rewrite, takes_cap
from llm_guard_mw.tokens import (
    count_text,
    load_vocabularies,
    tokenizer_of,
    upper_tokens,
    vocab_status,
    vocabulary,
)

__all__ = [
    "count_text",
    "describe",
    "image_tokens",
    "load_vocabularies",
    "rewrite",
    "upper_tokens",
    "vocab_status",
    "vocabulary",
]

#: How far a compressed body is inflated, on a copy.
INFLATED_BYTES_MAX = 2 * 1_048_576

#: Caps and counts beyond this are nonsense, and would leave the range of exact integers when multiplied.
NUMBER_MAX = 1_000_000_000

#: What we cannot inflate, or not to its end, is taken to be JSON that was compressed this well.
_USUAL_RATIO = 4

_CHOICES_MAX = 10_000
_NAME_MAX = 256


def describe(
    api: str | None,
    provider: str | None,
    method: str,
    path: str,
    body: bytes,
    *,
    content_encoding: str | None = None,
    body_complete: bool = True,
    total_bytes: int | None = None,
) -> Asked:
    """What is asked for. `api` None: any body, of the app's own; then the usual names are looked for all the same.

    `total_bytes` is the length of the whole body where it is known (Content-Length) and `body` is only its start.
    """
    try:
        return _describe(api, provider, method, path, body, content_encoding, body_complete, total_bytes)
    except Exception:
        # Whatever a hostile body did to us, its size still bounds it: a token is at least a byte.
        size = max(len(body), total_bytes or 0)
        return Asked(api=api, provider=provider, input_tokens=size, opaque=("body",), cappable=False)


def _describe(
    api: str | None,
    provider: str | None,
    method: str,
    path: str,
    body: bytes,
    content_encoding: str | None,
    body_complete: bool,
    total_bytes: int | None,
) -> Asked:
    endpoint = (_endpoint if len(path) <= _PATH_MAX else _endpoint.__wrapped__)(api, method, path)
    unbounded, model = endpoint.unbounded, endpoint.model
    if not endpoint.counted:
        return Asked(api=api, provider=provider, model=model, counted=False, output=False, kinds=())
    opaque: list[str] = []
    sent = len(body)
    plain = not content_encoding or content_encoding.strip().lower() in ("", "identity")
    if not plain and content_encoding:
        inflated = _inflated(body, content_encoding)
        if inflated is None:
            return Asked(
                api=api,
                provider=provider,
                model=model,
                input_tokens=max(sent, total_bytes or 0) * _USUAL_RATIO,
                stream=endpoint.stream,
                opaque=("content_encoding",),
                unbounded=unbounded,
                output=endpoint.output,
                cappable=False,
            )
        body, cut = inflated
        body_complete = body_complete and not cut
        total_bytes = None if total_bytes is None else total_bytes * _USUAL_RATIO
        sent *= _USUAL_RATIO
    if not body_complete:
        # Whatever is still to come is bounded by its bytes. Its fields are not known, so there is no cap.
        rest = max((total_bytes or 0) - sent, 0)
        opaque.append("body")
        return Asked(
            api=api,
            provider=provider,
            model=model or _top_level_string(body, "model"),
            input_tokens=_margin(upper_tokens(body), body, model) + rest,
            stream=endpoint.stream,
            opaque=tuple(opaque),
            unbounded=unbounded,
            output=endpoint.output,
            cappable=False,
        )
    if body[:2] == b"--":
        return _of_form(api, provider, endpoint, body)
    asked = _read(body)
    if asked is None:
        return Asked(
            api=api,
            provider=provider,
            model=model,
            input_tokens=upper_tokens(body),
            stream=endpoint.stream,
            unbounded=unbounded,
            output=endpoint.output,
            cappable=False,
        )
    name = model or _model_name(asked)
    text, media = text_and_media(body, name)
    tokens = _margin(upper_tokens(text), text, name) + media.tokens + _surcharge(api, name, asked, text)
    opaque += media.opaque
    opaque += _opaque_of(asked, name)
    if unbounded is None and asked.background is True:
        unbounded = "background"
    stream = asked.stream is True or endpoint.stream
    cap = _cap(asked)
    if api == "openai.speech":
        # Speech is billed by the character or by tokens of sound, and cannot be capped: 4 tokens a character.
        tokens = max(tokens, len(body))
        cap = 4 * len(body)
    elif api == "openai.images":
        cap = _IMAGE_OUTPUT_TOKENS
    return Asked(
        api=api,
        provider=provider,
        model=name,
        input_tokens=tokens,
        cap=cap,
        choices=_choices(asked),
        stream=stream,
        includes_usage=not stream or _includes_usage(api, provider, asked),
        opaque=tuple(dict.fromkeys(opaque)),
        unbounded=unbounded,
        output=endpoint.output,
        service_tier=_tier(asked),
        kinds=_kinds(text, media),
        thinks=_thinks(asked),
        cappable=plain and takes_cap(api),
    )


# ---------------------------------------------------------------- the fields of a body


class _Generation(msgspec.Struct):
    """Gemini's generationConfig, in both spellings, and Bedrock's and Ollama's namesakes."""

    max_output: int | float | None = msgspec.field(default=None, name="maxOutputTokens")
    max_output_snake: int | float | None = msgspec.field(default=None, name="max_output_tokens")
    max_tokens: int | float | None = msgspec.field(default=None, name="maxTokens")
    max_token_count: int | float | None = msgspec.field(default=None, name="maxTokenCount")
    num_predict: int | float | None = None
    candidates: int | float | None = msgspec.field(default=None, name="candidateCount")
    candidates_snake: int | float | None = msgspec.field(default=None, name="candidate_count")


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Thinking(msgspec.Struct):
    type: str | None = None


class _Tool(msgspec.Struct):
    """A tool's type, and Gemini's tools that are known by a key."""

    type: str | None = None
    google_search: msgspec.Raw = msgspec.field(default=msgspec.Raw(), name="googleSearch")
    google_search_snake: msgspec.Raw = msgspec.field(default=msgspec.Raw(), name="google_search")
    retrieval: msgspec.Raw = msgspec.field(default=msgspec.Raw(), name="googleSearchRetrieval")
    retrieval_snake: msgspec.Raw = msgspec.field(default=msgspec.Raw(), name="google_search_retrieval")
    code: msgspec.Raw = msgspec.field(default=msgspec.Raw(), name="codeExecution")
    code_snake: msgspec.Raw = msgspec.field(default=msgspec.Raw(), name="code_execution")
    url: msgspec.Raw = msgspec.field(default=msgspec.Raw(), name="urlContext")
    url_snake: msgspec.Raw = msgspec.field(default=msgspec.Raw(), name="url_context")
    files: msgspec.Raw = msgspec.field(default=msgspec.Raw(), name="fileSearch")
    files_snake: msgspec.Raw = msgspec.field(default=msgspec.Raw(), name="file_search")
    maps: msgspec.Raw = msgspec.field(default=msgspec.Raw(), name="googleMaps")
    maps_snake: msgspec.Raw = msgspec.field(default=msgspec.Raw(), name="google_maps")


class _Body(msgspec.Struct):
    """What is read of any JSON body. Everything else is skipped unread, which is what makes this fast."""

    model: str | None = None
    model_id: str | None = None
    model_camel: str | None = msgspec.field(default=None, name="modelId")
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    background: bool | None = None
    n: int | float | None = None
    best_of: int | float | None = None
    num_generations: int | float | None = None
    max_tokens: int | float | None = None
    max_completion_tokens: int | float | None = None
    max_output_tokens: int | float | None = None
    max_new_tokens: int | float | None = None
    max_tokens_camel: int | float | None = msgspec.field(default=None, name="maxTokens")
    max_tokens_to_sample: int | float | None = None
    max_gen_len: int | float | None = None
    generation: _Generation | None = msgspec.field(default=None, name="generationConfig")
    generation_snake: _Generation | None = msgspec.field(default=None, name="generation_config")
    inference: _Generation | None = msgspec.field(default=None, name="inferenceConfig")
    titan: _Generation | None = msgspec.field(default=None, name="textGenerationConfig")
    options: _Generation | None = None
    parameters: _Generation | None = None
    service_tier: str | None = None
    speed: str | None = None
    thinking: _Thinking | None = None
    tools: list[_Tool] | None = None
    tool_config: msgspec.Raw = msgspec.field(default=msgspec.Raw(), name="toolConfig")
    functions: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    previous_response_id: str | None = None
    conversation: msgspec.Raw = msgspec.Raw()
    container: msgspec.Raw = msgspec.Raw()
    mcp_servers: msgspec.Raw = msgspec.Raw()
    web_search_options: msgspec.Raw = msgspec.Raw()
    search_parameters: msgspec.Raw = msgspec.Raw()
    plugins: msgspec.Raw = msgspec.Raw()
    connectors: msgspec.Raw = msgspec.Raw()
    cached_content: msgspec.Raw = msgspec.field(default=msgspec.Raw(), name="cachedContent")
    cached_content_snake: msgspec.Raw = msgspec.field(default=msgspec.Raw(), name="cached_content")
    output_config: msgspec.Raw = msgspec.Raw()
    output_format: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(_Body).decode
_SINGLE: tuple[tuple[str, type | tuple[type, ...]], ...] = (
    *((name, str) for name in ("model", "model_id", "modelId", "service_tier", "speed", "previous_response_id")),
    *((name, bool) for name in ("stream", "background")),
    *(
        (name, (int, float))
        for name in (
            "n",
            "best_of",
            "num_generations",
            "max_tokens",
            "max_completion_tokens",
            "max_output_tokens",
            "max_new_tokens",
            "maxTokens",
            "max_tokens_to_sample",
            "max_gen_len",
        )
    ),
)
_GROUPS = (
    "generationConfig",
    "generation_config",
    "inferenceConfig",
    "textGenerationConfig",
    "options",
    "parameters",
    "stream_options",
    "thinking",
)
_REFERENCES = (
    "toolConfig",
    "functions",
    "prompt",
    "conversation",
    "container",
    "mcp_servers",
    "web_search_options",
    "search_parameters",
    "plugins",
    "connectors",
    "cachedContent",
    "cached_content",
    "output_config",
    "output_format",
)


def _read(body: bytes) -> _Body | None:
    """The fields of a JSON object; None where it is none."""
    try:
        return _decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        pass
    # A field of another type than is usual. Providers differ in what they let pass, so the other fields still count.
    try:
        loose = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    return _convert(loose)


def _convert(loose: Mapping[str, msgspec.Raw]) -> _Body:
    kept: dict[str, Any] = {}  # Any: parsed JSON
    for name, kind in _SINGLE:
        value = _value(loose.get(name))
        if isinstance(value, str) and isinstance(kind, tuple):
            value = _number_in(value)
        if _is_number(value):
            value = min(value, NUMBER_MAX)
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            kept[name] = value
    for name in _GROUPS:
        group = _value(loose.get(name))
        if isinstance(group, dict):
            kept[name] = {
                key: min(value, NUMBER_MAX) if _is_number(value) else value
                for key, value in group.items()
                if (isinstance(value, bool) if key == "include_usage" else _is_number(value) or key == "type")
                and (key != "type" or isinstance(value, str))
            }
    tools = _value(loose.get("tools"))
    if isinstance(tools, list):
        kept["tools"] = [
            {key: value for key, value in tool.items() if key != "type" or isinstance(value, str)}
            for tool in tools
            if isinstance(tool, dict)
        ]
    for name in _REFERENCES:
        if name in loose:
            kept[name] = _value(loose[name])
    return _decode(msgspec.json.encode(kept))


def _value(raw: msgspec.Raw | None) -> Any:  # Any: parsed JSON
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number_in(text: str) -> int | None:
    return int(text) if len(text) <= 18 and text.isascii() and text.isdigit() else None


def _whole(value: float | None) -> int | None:
    """A count as providers take it: rounded up, and only if there is anything to count."""
    if value is None or value <= 0 or value != value:
        return None
    return NUMBER_MAX if value >= NUMBER_MAX else int(-(-value // 1))


def _cap(asked: _Body) -> int | None:
    """The caller's own cap on output. Where several stand, the largest: which one the provider obeys is its own."""
    said: list[float | None] = [
        asked.max_tokens,
        asked.max_completion_tokens,
        asked.max_output_tokens,
        asked.max_new_tokens,
        asked.max_tokens_camel,
        asked.max_tokens_to_sample,
        asked.max_gen_len,
    ]
    for group in (
        asked.generation,
        asked.generation_snake,
        asked.inference,
        asked.titan,
        asked.options,
        asked.parameters,
    ):
        if group is not None:
            said += (
                group.max_output,
                group.max_output_snake,
                group.max_tokens,
                group.max_token_count,
                group.num_predict,
            )
    caps = [cap for value in said if value is not None and (cap := _whole(value)) is not None]
    return max(caps) if caps else None


def _choices(asked: _Body) -> int:
    said: list[float | None] = [asked.n, asked.best_of, asked.num_generations]
    for group in (asked.generation, asked.generation_snake):
        if group is not None:
            said += (group.candidates, group.candidates_snake)
    choices = max([count for value in said if value is not None and (count := _whole(value)) is not None], default=1)
    return min(choices * _prompts(asked), _CHOICES_MAX)


def _prompts(asked: _Body) -> int:
    """Completions answer every prompt of a list of texts or of token lists; a list of numbers is one prompt."""
    if not len(asked.prompt):
        return 1
    raw = bytes(asked.prompt).lstrip()
    if not raw.startswith(b"["):
        return 1
    prompts = _value(asked.prompt)
    if not isinstance(prompts, list) or not prompts or isinstance(prompts[0], int):
        return 1
    return len(prompts)


def _model_name(asked: _Body) -> str | None:
    name = asked.model or asked.model_id or asked.model_camel
    return name[:_NAME_MAX] if name else None


def _tier(asked: _Body) -> str | None:
    """The service tier; Anthropic's fast speed is priced like one."""
    if asked.speed == "fast":
        return "fast"
    return asked.service_tier if asked.service_tier and len(asked.service_tier) <= 64 else None


def _thinks(asked: _Body) -> bool:
    return asked.thinking is not None and asked.thinking.type != "disabled"


# ---------------------------------------------------------------- what the path says

_MODEL_IN_PATH = (
    re.compile(r"/models/([^/:?]+):[A-Za-z]"),  # Gemini, and Vertex' publishers
    re.compile(r"/deployments/([^/?]+)/"),  # Azure
    re.compile(r"/model/([^/?]+)/(?:converse|invoke)"),  # Bedrock
    re.compile(r"/tunedModels/([^/:?]+):[A-Za-z]"),
)
_STREAMS = re.compile(r":stream|/converse-stream$|/invoke-with-response-stream$|_stream$")
_UNBOUNDED_PATHS = (
    (re.compile(r"/batches(/|$)|:batchGenerateContent$|/batchPredictionJobs(/|$)"), "batch"),
    (re.compile(r"/fine_tuning(/|$)|/fine-tunes(/|$)|/tuningJobs(/|$)|/tunedModels$"), "fine_tuning"),
    (re.compile(r"/realtime(/|$)|BidiGenerateContent"), "realtime"),
    (re.compile(r"/videos(/|$)|:predictLongRunning$"), "video"),
)
_UNBOUNDED_APIS = {
    "batches": "batch",
    "batch": "batch",
    "fine_tuning": "fine_tuning",
    "realtime": "realtime",
    "live": "realtime",
    "videos": "video",
    "video": "video",
    "evals": "batch",
    "runs": "background",
}
_FREE = frozenset(
    {
        "assistants",
        "cancel",
        "containers",
        "conversations",
        "count_tokens",
        "delete",
        "files",
        "input_items",
        "models",
        "moderations",
        "operations",
        "retrieve",
        "stored",
        "threads",
        "tokenize",
        "uploads",
        "vector_stores",
    }
)
_WITHOUT_OUTPUT = frozenset({"embeddings", "embed", "rerank", "ocr"})


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """What is known of a request before its body is read."""

    unbounded: str | None
    counted: bool
    output: bool
    stream: bool
    model: str | None  # that the URL names. It is the one that runs, whatever the body says.


_PATH_MAX = 256


@lru_cache(maxsize=512)
def _endpoint(api: str | None, method: str, path: str) -> _Endpoint:
    path, _, query = path.partition("?")
    verb = api.rpartition(".")[2] if api is not None else None
    if verb is not None:
        unbounded = _UNBOUNDED_APIS.get(verb)
    else:
        unbounded = next((kind for pattern, kind in _UNBOUNDED_PATHS if pattern.search(path)), None)
    # A realtime session is opened by a GET, so it is the one GET that costs.
    counted = unbounded == "realtime" or (
        verb not in _FREE and method.upper() not in ("GET", "HEAD", "OPTIONS", "DELETE")
    )
    named = next((found[1] for pattern in _MODEL_IN_PATH if (found := pattern.search(path))), None)
    return _Endpoint(
        unbounded=unbounded,
        counted=counted,
        output=verb not in _WITHOUT_OUTPUT,
        stream=_STREAMS.search(path) is not None or "alt=sse" in query,
        model=unquote(named)[:_NAME_MAX] if named else None,
    )


# ---------------------------------------------------------------- what a body only refers to

#: Tools that the caller's own program runs. All other types run at the provider, and bring in what nobody counted.
_CALLERS_TOOLS = (
    "function",
    "custom",
    "object",
    "bash_",
    "text_editor_",
    "computer",
    "memory_",
    "local_shell",
    "apply_patch",
    "namespace",
)
_EMPTY = (b"", b"null", b"[]", b"{}", b'""')
_STREAMS_WITH_USAGE = frozenset({"mistral", "groq", "perplexity", "xai", "deepseek", "cohere", "voyage"})


def _opaque_of(asked: _Body, model: str | None) -> Iterator[str]:
    if asked.previous_response_id:
        yield "previous_response_id"
    for name, raw in (
        ("conversation", asked.conversation),
        ("container", asked.container),
        ("mcp", asked.mcp_servers),
        ("web_search", asked.web_search_options),
        ("web_search", asked.search_parameters),
        ("web_search", asked.plugins),
        ("connectors", asked.connectors),
        ("cached_content", asked.cached_content),
        ("cached_content", asked.cached_content_snake),
    ):
        if len(raw) and bytes(raw).strip() not in _EMPTY:
            yield name
    if len(asked.prompt) and bytes(asked.prompt).lstrip().startswith(b"{"):
        yield "prompt_id"
    if model is not None and _searches(model):
        yield "web_search"
    for tool in asked.tools or ():
        kind = tool.type
        if kind is not None and not kind.startswith(_CALLERS_TOOLS):
            yield kind[:64]
        if len(tool.google_search) or len(tool.google_search_snake) or len(tool.retrieval) or len(tool.retrieval_snake):
            yield "web_search"
        if len(tool.code) or len(tool.code_snake):
            yield "code_execution"
        if len(tool.url) or len(tool.url_snake) or len(tool.maps) or len(tool.maps_snake):
            yield "url_context"
        if len(tool.files) or len(tool.files_snake):
            yield "file_search"


_SEARCHES = re.compile(r":online$|-search-|search-(preview|api)|\bsonar|deep-research|compound")


@lru_cache(maxsize=512)
def _searches(model: str) -> bool:
    """Models that search the web in any case."""
    return _SEARCHES.search(model) is not None


def _includes_usage(api: str | None, provider: str | None, asked: _Body) -> bool:
    """Whether the stream will say its usage. Only OpenAI's older shapes have to be asked, and not everywhere."""
    if api not in ("openai.chat", "openai.completions"):
        return True
    if provider in _STREAMS_WITH_USAGE:
        return True
    return asked.stream_options is not None and asked.stream_options.include_usage is True


# ---------------------------------------------------------------- what else may be billed

_CACHE_MARKS = re.compile(rb'"cache_control"|"cachePoint"|"cache_point"')
_HOUR = re.compile(rb'"ttl"\s*:\s*"1h"')
_IMAGE_OUTPUT_TOKENS = 8_192


def _kinds(text: bytes, media: Media) -> tuple[str, ...]:
    kinds = set(media.kinds)
    if _CACHE_MARKS.search(text):
        kinds.add("cache_write")
        if _HOUR.search(text):
            kinds.add("cache_write_1h")
    return tuple(sorted(kinds))


def _margin(tokens: int, text: bytes, model: str | None) -> int:
    """A bound in OpenAI's tokens as one in the model's own."""
    return tokenizer_of(model).margin(tokens, text)


def _surcharge(api: str | None, model: str | None, asked: _Body, text: bytes) -> int:
    """What a provider adds to a prompt unasked, beyond what the JSON around it counts for.

    Seen in recorded exchanges: up to 700 tokens of instructions before tools, everywhere but at OpenAI; as much
    for each of Anthropic's own tool types, for citations, and half of it for structured output; a preamble of
    200 tokens at xAI, of 70 with gpt-oss, and 30 before a compaction.
    """
    family = _family(model) if model is not None and len(model) <= _NAME_MAX else None
    claude = api == "anthropic.messages" or family == "claude"
    tokens = 16
    if asked.tools or len(asked.tool_config) or len(asked.functions):
        tokens += 64 if family in ("openai", "gpt-oss") else 800
    if claude:
        own = [tool for tool in asked.tools or () if tool.type not in (None, "function", "custom", "object")]
        tokens += 800 * len(own)
        tokens += 400 if len(asked.output_config) or len(asked.output_format) else 0
        tokens += 800 if b'"citations"' in text else 0
    elif family == "grok":
        tokens += 256
    elif family == "gpt-oss":
        tokens += 96
    if api == "openai.responses.compact":
        tokens += 64
    return tokens


_FAMILIES = (
    ("claude", re.compile("claude")),
    ("grok", re.compile("grok")),
    ("gpt-oss", re.compile("gpt-oss")),
    ("openai", re.compile(r"gpt-|\bo[1345](-|$)|davinci|codex")),
)


@lru_cache(maxsize=512)
def _family(model: str) -> str | None:
    return next((family for family, pattern in _FAMILIES if pattern.search(model.lower())), None)


# ---------------------------------------------------------------- bodies that are not plain JSON


def _inflated(body: bytes, encoding: str) -> tuple[bytes, bool] | None:
    """A bounded copy, inflated, and whether it was cut; None where the coding is not one we can undo."""
    names = [name.strip().lower() for name in encoding.split(",") if name.strip()]
    cut = False
    for name in reversed(names):
        if name in ("identity", ""):
            continue
        if name in ("gzip", "x-gzip"):
            wbits = zlib.MAX_WBITS | 16
        elif name == "deflate":
            # Some send the raw stream under this name.
            wbits = zlib.MAX_WBITS if body[:1] and body[0] & 0x0F == 8 else -zlib.MAX_WBITS
        else:
            return None
        inflater = zlib.decompressobj(wbits)
        try:
            body = inflater.decompress(body, INFLATED_BYTES_MAX)
        except zlib.error:
            return None
        cut = cut or not inflater.eof
    return body, cut


# A client's bytes meet these patterns, so each matches to some end wherever it begins to: none tries again from
# every place in a line, which would cost a megabyte squared.
_FORM_PART = re.compile(rb"Content-Disposition:([^\r\n]*)", re.IGNORECASE)
_FORM_NAME = re.compile(rb'\bname="([a-z_\[\]]{1,64})"', re.IGNORECASE)


def _form_parts(body: bytes) -> tuple[dict[str, bytes], int]:
    """The fields of a multipart form with their values, and how many files it has."""
    fields: dict[str, bytes] = {}
    files = position = 0
    while part := _FORM_PART.search(body, position):
        position = part.end()
        name = _FORM_NAME.search(part[1])
        if b"filename" in part[1].lower():
            files += 1
        elif name is not None and body.startswith(b"\r\n\r\n", position):
            end = body.find(b"\r\n--", position + 4)
            end = len(body) if end < 0 else end
            fields[name[1].decode()] = body[position + 4 : end]
            position = end
    return fields, files


def _of_form(api: str | None, provider: str | None, endpoint: _Endpoint, body: bytes) -> Asked:
    """A multipart form: sound to be written down, images to be edited. Its files count by rule."""
    fields, files = _form_parts(body)
    model = endpoint.model or (fields.get("model", b"").decode("utf-8", "replace")[:_NAME_MAX] or None)
    text = sum(upper_tokens(value) for value in fields.values())
    cap: int | None = None
    kinds: tuple[str, ...] = ()
    if api == "openai.audio":
        tokens = len(body) // BYTES_PER_AUDIO_TOKEN + 32 + text
        # A second of speech is a dozen tokens of text at the most, of which an estimate has 32.
        cap, kinds = tokens, ("audio",)
    elif api == "openai.images":
        tokens = text + files * image_tokens(model)
        cap, kinds = _IMAGE_OUTPUT_TOKENS, ("image",)
    else:
        tokens = len(body)
    choices = _whole(_number_in(fields.get("n", b"").decode("utf-8", "replace"))) or 1
    return Asked(
        api=api,
        provider=provider,
        model=model,
        input_tokens=tokens,
        cap=cap,
        choices=min(choices, _CHOICES_MAX),
        stream=fields.get("stream", b"").lower() == b"true",
        unbounded=endpoint.unbounded,
        kinds=kinds,
        cappable=False,
    )


# A string that nobody closes is one to the end, or each quote in it would be tried as the start of another.
_JSON_PIECE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[{}\[\]:]', re.DOTALL)


def _top_level_string(body: bytes, key: str) -> str | None:
    """A string of the outermost object, in JSON that is cut off. Inner objects may hold the same key for spite."""
    wanted, depth, after_key = f'"{key}"'.encode(), 0, 0
    for found in _JSON_PIECE.finditer(body):
        piece = found[0]
        if piece in (b"{", b"["):
            depth, after_key = depth + 1, 0
        elif piece in (b"}", b"]"):
            depth, after_key = depth - 1, 0
        elif depth != 1:
            continue
        elif after_key == 2 and piece != b":":
            value = _value(msgspec.Raw(piece))
            return value[:_NAME_MAX] if isinstance(value, str) and value else None
        elif piece == b":":
            after_key = 2 if after_key == 1 else 0
        else:
            after_key = 1 if piece == wanted else 0
    return None

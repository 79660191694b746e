"""A request with another model, an output cap or a wish for usage written into it, and everything else kept.

Only the fields that change are written anew. All others keep their bytes: the order of keys, fields that are
unknown here, the spelling of numbers. A key that stands twice stands once afterwards, with the value that counts.

What is not a JSON object comes back as it was; so does a request that names no place for the thing asked.
"""

from __future__ import annotations

import re
from urllib.parse import quote

import msgspec

_Fields = dict[str, msgspec.Raw]

#: The places in a path that name the model, by how it is written there.
_IN_PATH = (
    (re.compile(r"(/models/)[^/:?]+(:[A-Za-z])"), "/:@"),
    (re.compile(r"(/deployments/)[^/?]+(/)"), ""),
    (re.compile(r"(/model/)[^/?]+(/(?:converse|invoke))"), ""),
)
#: The formats whose place for an output cap is known. In any other one a cap would be a field that nobody knows.
_WITH_CAP = frozenset(
    {
        "anthropic.complete",
        "anthropic.messages",
        "bedrock.converse",
        "cohere.chat",
        "cohere.chat.v1",
        "cohere.chat.v2",
        "cohere.generate",
        "gemini.generate",
        "ollama.chat",
        "ollama.generate",
        "openai.chat",
        "openai.completions",
        "openai.responses",
    }
)
_OLD_AZURE = re.compile(r"[?&]api-version=20(?:1\d|2[0-3]|24-0[1-8])-?")
_REASONS = re.compile(r"(^|/)(o\d|gpt-([5-9]|\d\d))(?!.*chat)")


def rewrite(
    api: str | None,
    path: str,
    body: bytes,
    *,
    model: str | None = None,
    cap: int | None = None,
    include_usage: bool = False,
    provider: str | None = None,
) -> tuple[str, bytes]:
    """The request's path and body, with `model`, `cap` and `stream_options.include_usage` written in."""
    fields = _fields(body)
    if fields is None:
        return (path if model is None else _path_with(path, model)), body
    before = dict(fields)
    if model is not None:
        path = _write_model(path, fields, model)
    if cap is not None:
        _write_cap(api, provider, path, fields, cap, model)
    if include_usage:
        _ask_for_usage(api, provider, path, fields)
    return path, body if fields == before else _join(fields)


def takes_cap(api: str | None) -> bool:
    """Whether `rewrite` knows where such a request says how much may be written. None: a body of the app's own."""
    return api is None or api in _WITH_CAP


def _write_model(path: str, fields: _Fields, model: str) -> str:
    written = _path_with(path, model)
    if "model" in fields or written == path:
        old = _text(fields.get("model"))
        # Gemini's bodies may repeat the name as a resource.
        prefix = "models/" if old is not None and old.startswith("models/") else ""
        fields["model"] = _raw(model if model.startswith(prefix) else prefix + model)
    return written


def _path_with(path: str, model: str) -> str:
    name = model.removeprefix("models/")
    for pattern, safe in _IN_PATH:
        if found := pattern.search(path):
            return path[: found.end(1)] + quote(name, safe=safe) + path[found.start(2) :]
    return path


def _write_cap(api: str | None, provider: str | None, path: str, fields: _Fields, cap: int, model: str | None) -> None:
    if api is not None and api.startswith("gemini."):
        camel = "generationConfig" in fields or "generation_config" not in fields
        inside = ("maxOutputTokens", "max_output_tokens")
        _write_inside(
            fields, "generationConfig" if camel else "generation_config", inside if camel else inside[::-1], cap
        )
    elif api == "bedrock.converse":
        _write_inside(fields, "inferenceConfig", ("maxTokens",), cap)
    elif api in ("ollama.chat", "ollama.generate"):
        _write_inside(fields, "options", ("num_predict",), cap)
    elif api == "openai.responses":
        fields["max_output_tokens"] = _raw(cap)
    elif api in (None, "openai.chat"):
        _write_chat_cap(provider, fields, cap, model)
    elif api == "bedrock.invoke":
        # Each maker has a name of its own there; only one that the caller used is known to be right.
        for name in ("max_tokens", "max_gen_len", "max_tokens_to_sample", "maxTokens"):
            if name in fields:
                fields[name] = _raw(cap)
        for group in ("inferenceConfig", "textGenerationConfig"):
            if group in fields:
                _write_inside(fields, group, ("maxTokens" if group == "inferenceConfig" else "maxTokenCount",), cap)
    elif api == "anthropic.complete":
        fields["max_tokens_to_sample"] = _raw(cap)
    else:
        fields["max_tokens"] = _raw(cap)


def _write_chat_cap(provider: str | None, fields: _Fields, cap: int, model: str | None) -> None:
    """The field that the caller used, else the one that the provider takes.

    OpenAI's reasoning models refuse `max_tokens`, so a request that is moved to one has its field renamed.
    """
    openai = provider in ("openai", "azure", None)
    reasons = _REASONS.search(model or _text(fields.get("model")) or "") is not None
    used = [name for name in ("max_completion_tokens", "max_tokens") if _said(fields.get(name))]
    if openai and used == ["max_tokens"] and model is not None and reasons:
        fields.pop("max_tokens")
        used = []
    newer = provider in ("openai", "azure") or (openai and reasons)
    for name in used or ["max_completion_tokens" if newer else "max_tokens"]:
        fields[name] = _raw(cap)


def _ask_for_usage(api: str | None, provider: str | None, path: str, fields: _Fields) -> None:
    """Only a stream may be asked, only in OpenAI's older shapes, and not an Azure of before September 2024."""
    if api not in ("openai.chat", "openai.completions") or bytes(fields.get("stream", b"")).strip() != b"true":
        return
    if provider == "azure" and _OLD_AZURE.search(path):
        return
    options = _fields(bytes(fields.get("stream_options", b""))) or {}
    options["include_usage"] = msgspec.Raw(b"true")
    fields["stream_options"] = msgspec.Raw(_join(options))


def _write_inside(fields: _Fields, group: str, names: tuple[str, ...], cap: int) -> None:
    """`cap` at the first of `names` that is there, else at the first, in the object at `group`."""
    inner = _fields(bytes(fields.get(group, b""))) or {}
    name = next((name for name in names if name in inner), names[0])
    inner[name] = _raw(cap)
    fields[group] = msgspec.Raw(_join(inner))


# ---------------------------------------------------------------- objects as they stand

_decode = msgspec.json.Decoder(_Fields).decode


def _fields(body: bytes) -> _Fields | None:
    """The fields of a JSON object, each with the bytes of its value."""
    try:
        return _decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None


def _join(fields: _Fields) -> bytes:
    return b"{" + b",".join(msgspec.json.encode(name) + b":" + bytes(raw) for name, raw in fields.items()) + b"}"


def _raw(value: str | int) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def _text(raw: msgspec.Raw | None) -> str | None:
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw, type=str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _said(raw: msgspec.Raw | None) -> bool:
    return raw is not None and bytes(raw).strip() != b"null"

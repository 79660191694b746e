"""Anthropic: messages, and their token count."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from llm_guard_mw.cli.demo.wires.prompt import Body, Piece, Prompt, Reply, Wire, sse, texts_of


def _parse_messages(body: Body, model: str | None) -> Prompt:
    return Prompt(
        model=str(body.get("model") or model),
        texts=tuple(texts_of([body.get("tools", []), body.get("system", ""), body["messages"]])),
        messages=1 + len(body["messages"]),
        cap=body.get("max_tokens"),
        stream=bool(body.get("stream")),
        marks_cache='"cache_control"' in json.dumps(body),
        reasons=(body.get("thinking") or {}).get("type") in ("enabled", "adaptive"),
    )


def _anthropic_usage(reply: Reply, output_tokens: int) -> Body:
    fresh = reply.input_tokens - reply.cached_tokens - reply.cache_write_tokens
    return {
        "input_tokens": fresh,
        "cache_creation_input_tokens": reply.cache_write_tokens,
        "cache_read_input_tokens": reply.cached_tokens,
        "cache_creation": {
            "ephemeral_5m_input_tokens": reply.cache_write_tokens,
            "ephemeral_1h_input_tokens": 0,
        },
        "output_tokens": output_tokens,
        "service_tier": "standard",
        "inference_geo": "not_available",
    }


def _message(prompt: Prompt, reply: Reply, *, done: bool) -> Body:
    thought = {"type": "thinking", "thinking": "Thinking about it.", "signature": "c3RhbmQtaW4="}
    content = [thought] if reply.reasoning_tokens else []
    return {
        "model": prompt.model,
        "id": f"msg_{reply.id}",
        "type": "message",
        "role": "assistant",
        "content": [*content, {"type": "text", "text": reply.text()}] if done else [],
        "stop_reason": ("max_tokens" if reply.cut else "end_turn") if done else None,
        "stop_sequence": None,
        "usage": _anthropic_usage(reply, reply.output_tokens if done else 1),
    }


def _whole_message(prompt: Prompt, reply: Reply) -> Body:
    return _message(prompt, reply, done=True)


def _message_pieces(prompt: Prompt, reply: Reply) -> Iterator[Piece]:
    out = 0

    def event(kind: str, **fields: Any) -> Piece:
        return sse({"type": kind, **fields}, kind), out

    def block(index: int, start: Body, deltas: list[tuple[Body, int]]) -> Iterator[Piece]:
        nonlocal out
        yield event("content_block_start", index=index, content_block=start)
        for delta, tokens in deltas:
            out += tokens
            yield event("content_block_delta", index=index, delta=delta)
        yield event("content_block_stop", index=index)

    yield event("message_start", message=_message(prompt, reply, done=False))
    yield event("ping")
    index = 0
    if reply.reasoning_tokens:
        thinking = {"type": "thinking_delta", "thinking": "Thinking about it."}
        signature = {"type": "signature_delta", "signature": "c3RhbmQtaW4="}
        deltas = [(thinking, reply.reasoning_tokens), (signature, 0)]
        yield from block(0, {"type": "thinking", "thinking": "", "signature": ""}, deltas)
        index = 1
    words = [({"type": "text_delta", "text": word}, 1) for word in reply.choices[0]]
    yield from block(index, {"type": "text", "text": ""}, words)
    usage = _anthropic_usage(reply, reply.output_tokens)
    del usage["cache_creation"], usage["service_tier"], usage["inference_geo"]
    usage["output_tokens_details"] = {"thinking_tokens": reply.reasoning_tokens}
    stop = {"stop_reason": "max_tokens" if reply.cut else "end_turn", "stop_sequence": None}
    yield event("message_delta", delta=stop, usage=usage)
    yield event("message_stop")


def _whole_message_count(prompt: Prompt, reply: Reply) -> Body:
    return {"input_tokens": reply.input_tokens}


WIRES = {
    "/messages/count_tokens": Wire("anthropic.count_tokens", _parse_messages, _whole_message_count, counts=False),
    "/messages": Wire("anthropic.messages", _parse_messages, _whole_message, _message_pieces),
}

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    529: "overloaded_error",
}


def error_body(status: int, message: str, request_id: str) -> Body:
    error = {"type": _KINDS.get(status, "api_error"), "message": message}
    return {"type": "error", "error": error, "request_id": request_id}

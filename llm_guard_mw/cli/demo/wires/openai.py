"""OpenAI: chat completions, completions, responses, embeddings."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from typing import Any

from llm_guard_mw.cli.demo.wires.prompt import (
    REASONING_MODELS,
    Body,
    Piece,
    Prompt,
    Reply,
    Wire,
    count_of,
    sse,
    texts_of,
    vector,
)

# ---------------------------------------------------------------- OpenAI chat


def _parse_chat(body: Body, model: str | None) -> Prompt:
    name = str(body.get("model") or model)
    return Prompt(
        model=name,
        texts=tuple(texts_of([body.get("tools", []), body["messages"]])),
        messages=1 + len(body["messages"]),
        cap=body.get("max_completion_tokens") or body.get("max_tokens"),
        choices=body.get("n") or 1,
        stream=bool(body.get("stream")),
        include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
        reasons=bool(REASONING_MODELS.match(name)),
    )


def _openai_usage(reply: Reply) -> Body:
    return {
        "prompt_tokens": reply.input_tokens,
        "completion_tokens": reply.output_tokens,
        "total_tokens": reply.input_tokens + reply.output_tokens,
        "prompt_tokens_details": {"cached_tokens": reply.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": reply.reasoning_tokens * len(reply.choices),
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _chat_head(prompt: Prompt, reply: Reply, kind: str) -> Body:
    return {
        "id": f"chatcmpl-{reply.id}",
        "object": kind,
        "created": reply.at,
        "model": prompt.model,
        "service_tier": "default",
        "system_fingerprint": None,
    }


def _whole_chat(prompt: Prompt, reply: Reply) -> Body:
    choices: list[Body] = [
        {
            "index": i,
            "message": {"role": "assistant", "content": reply.text(i), "refusal": None, "annotations": []},
            "logprobs": None,
            "finish_reason": "length" if reply.cut else "stop",
        }
        for i in range(len(reply.choices))
    ]
    return _chat_head(prompt, reply, "chat.completion") | {"choices": choices, "usage": _openai_usage(reply)}


def _chat_pieces(prompt: Prompt, reply: Reply) -> Iterator[Piece]:
    head = _chat_head(prompt, reply, "chat.completion.chunk")
    nothing_yet: Body = {"usage": None} if prompt.include_usage else {}

    def chunk(index: int, delta: Body, finish: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return sse(head | {"choices": [choice]} | nothing_yet)

    out = 0
    for i, words in enumerate(reply.choices):
        out += reply.reasoning_tokens
        yield chunk(i, {"role": "assistant", "content": "", "refusal": None}), out
        for word in words:
            out += 1
            yield chunk(i, {"content": word}), out
        yield chunk(i, {}, "length" if reply.cut else "stop"), out
    if prompt.include_usage:
        yield sse(head | {"choices": [], "usage": _openai_usage(reply)}), out
    yield sse("[DONE]"), out


# ---------------------------------------------------------------- OpenAI completions


def _parse_completions(body: Body, model: str | None) -> Prompt:
    return Prompt(
        model=str(body.get("model") or model),
        texts=tuple(texts_of(body["prompt"])),
        messages=0,
        cap=body.get("max_tokens") or 16,  # the real default of this endpoint
        choices=body.get("n") or 1,
        stream=bool(body.get("stream")),
        include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
    )


def _completions_head(prompt: Prompt, reply: Reply) -> Body:
    return {"id": f"cmpl-{reply.id}", "object": "text_completion", "created": reply.at, "model": prompt.model}


def _whole_completions(prompt: Prompt, reply: Reply) -> Body:
    choices: list[Body] = [
        {"text": reply.text(i), "index": i, "logprobs": None, "finish_reason": "length" if reply.cut else "stop"}
        for i in range(len(reply.choices))
    ]
    return _completions_head(prompt, reply) | {"choices": choices, "usage": _openai_usage(reply)}


def _completions_pieces(prompt: Prompt, reply: Reply) -> Iterator[Piece]:
    head = _completions_head(prompt, reply)
    nothing_yet: Body = {"usage": None} if prompt.include_usage else {}

    def chunk(index: int, text: str, finish: str | None = None) -> bytes:
        choice = {"text": text, "index": index, "logprobs": None, "finish_reason": finish}
        return sse(head | {"choices": [choice]} | nothing_yet)

    out = 0
    for i, words in enumerate(reply.choices):
        for word in words:
            out += 1
            yield chunk(i, word), out
        yield chunk(i, "", "length" if reply.cut else "stop"), out
    if prompt.include_usage:
        yield sse(head | {"choices": [], "usage": _openai_usage(reply)}), out
    yield sse("[DONE]"), out


# ---------------------------------------------------------------- OpenAI responses


def _parse_responses(body: Body, model: str | None) -> Prompt:
    name = str(body.get("model") or model)
    return Prompt(
        model=name,
        texts=tuple(texts_of([body.get("tools", []), body.get("instructions", ""), body["input"]])),
        messages=1 + count_of(body["input"]),
        cap=body.get("max_output_tokens"),
        stream=bool(body.get("stream")),
        reasons=bool(REASONING_MODELS.match(name)),
    )


def _response(prompt: Prompt, reply: Reply, *, done: bool) -> Body:
    status = ("incomplete" if reply.cut else "completed") if done else "in_progress"
    return {
        "id": f"resp_{reply.id}",
        "object": "response",
        "created_at": reply.at,
        "status": status,
        "background": False,
        "completed_at": reply.at if done and not reply.cut else None,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if done and reply.cut else None,
        "instructions": None,
        "max_output_tokens": prompt.cap,
        "max_tool_calls": None,
        "model": prompt.model,
        "output": _response_output(reply) if done else [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": _responses_usage(reply) if done else None,
        "user": None,
        "metadata": {},
    }


def _responses_usage(reply: Reply) -> Body:
    return {
        "input_tokens": reply.input_tokens,
        "input_tokens_details": {"cached_tokens": reply.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": reply.output_tokens,
        "output_tokens_details": {"reasoning_tokens": reply.reasoning_tokens},
        "total_tokens": reply.input_tokens + reply.output_tokens,
    }


def _reasoning_item(reply: Reply) -> Body:
    return {"id": f"rs_{reply.id}", "type": "reasoning", "summary": []}


def _message_item(reply: Reply, text: str | None) -> Body:
    content = [] if text is None else [_text_part(text)]
    status = "in_progress" if text is None else ("incomplete" if reply.cut else "completed")
    return {"id": f"msg_{reply.id}", "type": "message", "status": status, "content": content, "role": "assistant"}


def _text_part(text: str) -> Body:
    return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}


def _response_output(reply: Reply) -> list[Body]:
    thought = [_reasoning_item(reply)] if reply.reasoning_tokens else []
    return [*thought, _message_item(reply, reply.text())]


def _responses_pieces(prompt: Prompt, reply: Reply) -> Iterator[Piece]:
    number = 0
    out = 0

    def event(kind: str, **fields: Any) -> Piece:
        nonlocal number
        data = {"type": kind, **fields, "sequence_number": number}
        number += 1
        return sse(data, kind), out

    yield event("response.created", response=_response(prompt, reply, done=False))
    yield event("response.in_progress", response=_response(prompt, reply, done=False))
    index = 0
    if reply.reasoning_tokens:
        out += reply.reasoning_tokens
        yield event("response.output_item.added", output_index=0, item=_reasoning_item(reply))
        yield event("response.output_item.done", output_index=0, item=_reasoning_item(reply))
        index = 1
    where = {"item_id": f"msg_{reply.id}", "output_index": index, "content_index": 0}
    yield event("response.output_item.added", output_index=index, item=_message_item(reply, None))
    yield event("response.content_part.added", **where, part=_text_part(""))
    for word in reply.choices[0]:
        out += 1
        yield event("response.output_text.delta", **where, delta=word, logprobs=[])
    yield event("response.output_text.done", **where, text=reply.text(), logprobs=[])
    yield event("response.content_part.done", **where, part=_text_part(reply.text()))
    yield event("response.output_item.done", output_index=index, item=_message_item(reply, reply.text()))
    last = "response.incomplete" if reply.cut else "response.completed"
    yield event(last, response=_response(prompt, reply, done=True))


def _whole_response(prompt: Prompt, reply: Reply) -> Body:
    return _response(prompt, reply, done=True)


def _whole_response_count(prompt: Prompt, reply: Reply) -> Body:
    return {"object": "response.input_tokens", "input_tokens": reply.input_tokens}


# ---------------------------------------------------------------- OpenAI embeddings


def _parse_embeddings(body: Body, model: str | None) -> Prompt:
    given = body["input"]
    rows = given if isinstance(given, list) else [given]
    if rows and isinstance(rows[0], int):
        rows = [rows]
    return Prompt(
        model=str(body.get("model") or model),
        texts=tuple(row if isinstance(row, str) else "" for row in rows),
        messages=0,
        extra_tokens=sum(len(row) for row in rows if isinstance(row, list)),
        base64=body.get("encoding_format") == "base64",
        dimensions=body.get("dimensions") or 1536,
    )


def _whole_embeddings(prompt: Prompt, reply: Reply) -> Body:
    def packed(values: list[float]) -> list[float] | str:
        return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode() if prompt.base64 else values

    data = [
        {"object": "embedding", "index": i, "embedding": packed(vector(text, prompt.dimensions))}
        for i, text in enumerate(prompt.texts)
    ]
    usage = {"prompt_tokens": reply.input_tokens, "total_tokens": reply.input_tokens}
    return {"object": "list", "data": data, "model": prompt.model, "usage": usage}


WIRES = {
    "/chat/completions": Wire("openai.chat", _parse_chat, _whole_chat, _chat_pieces),
    "/responses/input_tokens": Wire("openai.count_tokens", _parse_responses, _whole_response_count, counts=False),
    "/responses": Wire("openai.responses", _parse_responses, _whole_response, _responses_pieces),
    "/completions": Wire("openai.completions", _parse_completions, _whole_completions, _completions_pieces),
    "/embeddings": Wire("openai.embeddings", _parse_embeddings, _whole_embeddings, writes=False),
}

_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}


def error_body(status: int, message: str, request_id: str) -> Body:
    kind = "invalid_request_error" if status < 429 else "server_error" if status >= 500 else "requests"
    return {"error": {"message": message, "type": kind, "param": None, "code": _CODES.get(status)}}

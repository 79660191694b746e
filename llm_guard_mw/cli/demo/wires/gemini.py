"""Gemini: generateContent and its stream (SSE or one JSON array), token counts, embeddings."""

from __future__ import annotations

import json
from collections.abc import Iterator

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


def _parse_gemini(body: Body, model: str | None) -> Prompt:
    body = body.get("generateContentRequest") or body  # countTokens wraps it
    config = body.get("generationConfig") or {}
    thinking = (config.get("thinkingConfig") or {}).get("thinkingBudget")
    return Prompt(
        model=str(model),
        texts=tuple(texts_of([body.get("tools", []), body.get("systemInstruction", {}), body.get("contents", [])])),
        messages=count_of(body.get("contents", [])),
        cap=config.get("maxOutputTokens"),
        choices=config.get("candidateCount") or 1,
        reasons=bool(REASONING_MODELS.match(str(model))) and thinking != 0,
    )


def _gemini_usage(reply: Reply, words: int) -> Body:
    thoughts = reply.reasoning_tokens * len(reply.choices)
    usage: Body = {
        "promptTokenCount": reply.input_tokens,
        "totalTokenCount": reply.input_tokens + words + thoughts,
        "promptTokensDetails": [{"modality": "TEXT", "tokenCount": reply.input_tokens}],
        "serviceTier": "standard",
    }
    if words:
        usage["candidatesTokenCount"] = words
    if reply.cached_tokens:
        usage["cachedContentTokenCount"] = reply.cached_tokens
    if thoughts:
        usage["thoughtsTokenCount"] = thoughts
    return usage


def _gemini(prompt: Prompt, reply: Reply, candidates: list[Body], words: int) -> Body:
    return {
        "candidates": candidates,
        "usageMetadata": _gemini_usage(reply, words),
        "modelVersion": prompt.model,
        "responseId": reply.id,
    }


def _candidate(index: int, text: str, finish: str | None = None) -> Body:
    candidate: Body = {"content": {"parts": [{"text": text}], "role": "model"}, "index": index}
    return candidate | {"finishReason": finish} if finish else candidate


def _whole_gemini(prompt: Prompt, reply: Reply) -> Body:
    finish = "MAX_TOKENS" if reply.cut else "STOP"
    candidates = [_candidate(i, reply.text(i), finish) for i in range(len(reply.choices))]
    return _gemini(prompt, reply, candidates, sum(len(words) for words in reply.choices))


def _gemini_pieces(prompt: Prompt, reply: Reply) -> Iterator[Piece]:
    def framed() -> Iterator[tuple[Body, int]]:
        out = 0
        for i, words in enumerate(reply.choices):
            for word in words:
                out += 1
                yield _gemini(prompt, reply, [_candidate(i, word)], out), out
            yield _gemini(prompt, reply, [_candidate(i, "", "MAX_TOKENS" if reply.cut else "STOP")], out), out

    thoughts = reply.reasoning_tokens * len(reply.choices)
    if prompt.sse:
        for body, out in framed():
            # Gemini ends its lines with CR LF.
            yield sse(body).replace(b"\n", b"\r\n"), out + thoughts
        return
    out = 0
    for number, (body, out) in enumerate(framed()):
        yield (b"[" if number == 0 else b",\r\n") + json.dumps(body, indent=2).encode(), out + thoughts
    yield b"\n]", out + thoughts


def _whole_gemini_count(prompt: Prompt, reply: Reply) -> Body:
    details = [{"modality": "TEXT", "tokenCount": reply.input_tokens}]
    return {"totalTokens": reply.input_tokens, "promptTokensDetails": details}


def _parse_gemini_embed(body: Body, model: str | None) -> Prompt:
    requests = body.get("requests") or [body]
    return Prompt(
        model=str(model),
        texts=tuple(" ".join(texts_of(request.get("content", {}))) for request in requests),
        messages=0,
        dimensions=requests[0].get("outputDimensionality") or 768,
    )


def _whole_gemini_embed(prompt: Prompt, reply: Reply) -> Body:
    return {"embeddings": [{"values": vector(text, prompt.dimensions)} for text in prompt.texts]}


WIRES = {
    ":generateContent": Wire("gemini.generate", _parse_gemini, _whole_gemini),
    ":streamGenerateContent": Wire("gemini.generate", _parse_gemini, _whole_gemini, _gemini_pieces),
    ":countTokens": Wire("gemini.count_tokens", _parse_gemini, _whole_gemini_count, counts=False),
    ":embedContent": Wire("gemini.embed", _parse_gemini_embed, _whole_gemini_embed, writes=False),
    ":batchEmbedContents": Wire("gemini.embed", _parse_gemini_embed, _whole_gemini_embed, writes=False),
}

_STATUSES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
}


def error_body(status: int, message: str, request_id: str) -> Body:
    return {"error": {"code": status, "message": message, "status": _STATUSES.get(status, "INTERNAL")}}

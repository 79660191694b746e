"""The bodies that OpenAI, Anthropic and Gemini send, made from a prompt instead of a model.

A `Prompt` is what a request asks, whatever the wire; `write` turns it into a `Reply`, always the same words for the
same prompt; a `Wire` puts a reply into one provider's fields, whole or as a stream of pieces.

Rule 1: a token is a word. No real tokenizer makes fewer tokens than words, so a hold that covers a real provider
        covers this one.
Rule 2: a piece carries the number of output tokens that are out once it is sent, so that the books of a stream
        which breaks off say what was really served.
"""

from __future__ import annotations

from collections.abc import Callable

from llm_guard_mw.cli.demo.wires import anthropic, gemini, openai
from llm_guard_mw.cli.demo.wires.prompt import Body, Piece, Prompt, Reply, Wire, write

__all__ = ["ERRORS", "WIRES", "Body", "Piece", "Prompt", "Reply", "Wire", "write"]

#: What is served at the end of a path, whatever stands before it (Azure's deployments, Vertex' projects).
WIRES: dict[str, Wire] = {**openai.WIRES, **anthropic.WIRES, **gemini.WIRES}

#: A family's errors: status, message and request id into a body.
ERRORS: dict[str, Callable[[int, str, str], Body]] = {
    "openai": openai.error_body,
    "anthropic": anthropic.error_body,
    "gemini": gemini.error_body,
}

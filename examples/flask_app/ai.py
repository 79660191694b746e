"""The product's three features, as a blueprint: chat (OpenAI), a streamed story (Anthropic), summaries (Gemini)."""

from __future__ import annotations

from collections.abc import Iterator

import provider
from anthropic import Anthropic
from flask import Blueprint, Response, request
from google.genai import Client as Gemini
from openai import OpenAI

from llm_guard_mw import capture  # 3

provider.use_standin_where_no_key_is_set()

ai = Blueprint("ai", __name__)

openai = capture(OpenAI())  # 4
claude = capture(Anthropic())
gemini = capture(Gemini())


@ai.post("/chat")
def chat() -> dict[str, str | None]:
    answer = openai.chat.completions.create(
        model="gpt-4o",
        max_tokens=400,
        messages=[{"role": "user", "content": request.json["text"]}],
    )
    return {"model": answer.model, "text": answer.choices[0].message.content}


@ai.post("/stream")
def stream() -> Response:
    subject = request.json["text"]

    def words() -> Iterator[str]:
        with claude.messages.stream(
            model="claude-haiku-4-5",
            max_tokens=400,
            messages=[{"role": "user", "content": f"Tell a story about this: {subject}"}],
        ) as story:
            yield from story.text_stream

    return Response(words(), mimetype="text/plain")


@ai.post("/summarize")
def summarize() -> dict[str, str | None]:
    text = request.json["text"]
    answer = gemini.models.generate_content(model="gemini-2.5-flash-lite", contents=f"Summarize:\n{text}")
    return {"text": answer.text}

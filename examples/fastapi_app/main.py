"""A small AI product behind a spend guard: chat (OpenAI), a streamed story (Anthropic), summaries (Gemini).

The lines marked with a number are all that guards it; the handlers look as they would without.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import provider
from anthropic import AsyncAnthropic
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from google.genai import Client as Gemini
from openai import AsyncOpenAI
from pydantic import BaseModel

from llm_guard_mw import GuardMiddleware, capture  # 1

provider.use_standin_where_no_key_is_set()

app = FastAPI(title="A guarded AI app")
app.add_middleware(GuardMiddleware, config=Path(__file__).with_name("llm_guard.toml"))  # 2

openai = capture(AsyncOpenAI())  # 3
claude = capture(AsyncAnthropic())
gemini = capture(Gemini())


class Ask(BaseModel):
    text: str


@app.post("/chat")
async def chat(ask: Ask) -> dict[str, str | None]:
    answer = await openai.chat.completions.create(
        model="gpt-4o",
        max_tokens=400,
        messages=[{"role": "user", "content": ask.text}],
    )
    return {"model": answer.model, "text": answer.choices[0].message.content}


@app.post("/stream")
async def stream(ask: Ask) -> StreamingResponse:
    async def words() -> AsyncIterator[str]:
        async with claude.messages.stream(
            model="claude-haiku-4-5",
            max_tokens=400,
            messages=[{"role": "user", "content": f"Tell a story about this: {ask.text}"}],
        ) as story:
            async for text in story.text_stream:
                yield text

    return StreamingResponse(words(), media_type="text/plain")


@app.post("/summarize")
def summarize(ask: Ask) -> dict[str, str | None]:
    answer = gemini.models.generate_content(model="gemini-2.5-flash-lite", contents=f"Summarize:\n{ask.text}")
    return {"text": answer.text}


@app.get("/health")
async def health() -> dict[str, bool]:
    return {"ok": True}

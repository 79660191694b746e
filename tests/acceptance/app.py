"""The app that uvicorn's workers run; its provider and its configuration are named by the environment."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any

import openai
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from llm_guard_mw import GuardMiddleware, capture

app = FastAPI()
app.add_middleware(GuardMiddleware)
client = capture(
    openai.AsyncOpenAI(api_key="sk-acceptance", base_url=f"{os.environ['PROVIDER_URL']}/v1", max_retries=0)
)


def messages(text: str) -> Any:
    return [{"role": "user", "content": text}]


@app.get("/ready")
async def ready() -> dict[str, int]:
    return {"pid": os.getpid()}


@app.post("/api/chat")
async def chat(request: Request) -> dict[str, str | None]:
    asked = await request.json()
    answer = await client.chat.completions.create(
        model="gpt-4o-mini",
        messages=messages(asked["q"]),
        max_tokens=50,
        extra_headers={"x-standin": asked.get("standin", "")},
    )
    return {"said": answer.choices[0].message.content}


@app.post("/api/stream")
async def stream(request: Request) -> StreamingResponse:
    asked = await request.json()

    async def words() -> AsyncIterator[str]:
        async with await client.chat.completions.create(
            model="gpt-4o-mini",
            messages=messages(asked["q"]),
            max_tokens=400,
            stream=True,
            extra_headers={"x-standin": asked.get("standin", "")},
        ) as chunks:
            async for chunk in chunks:
                if chunk.choices:
                    yield chunk.choices[0].delta.content or ""

    return StreamingResponse(words(), headers={"x-pid": str(os.getpid())})

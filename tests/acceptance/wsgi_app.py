"""`app.py` once more as a Flask app, for the servers of WSGI; what they do at a fork is looked at from outside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import flask
import openai

from llm_guard_mw import WSGIGuardMiddleware, capture

app = flask.Flask(__name__)
# Flask's own idiom, to which its type of a method says no.
app.wsgi_app = WSGIGuardMiddleware(app.wsgi_app)  # type: ignore[method-assign]
client = capture(openai.OpenAI(api_key="sk-acceptance", base_url=f"{os.environ['PROVIDER_URL']}/v1", max_retries=0))


def messages(text: str) -> Any:
    return [{"role": "user", "content": text}]


@app.get("/ready")
def ready() -> dict[str, int]:
    return {"pid": os.getpid()}


@app.post("/api/chat")
def chat() -> dict[str, str | None]:
    asked = flask.request.get_json()
    answer = client.chat.completions.create(
        model="gpt-4o-mini",
        messages=messages(asked["q"]),
        max_tokens=50,
        extra_headers={"x-standin": asked.get("standin", "")},
    )
    return {"said": answer.choices[0].message.content}


@app.post("/api/stream")
def stream() -> flask.Response:
    asked = flask.request.get_json()

    def words() -> Iterator[str]:
        with client.chat.completions.create(
            model="gpt-4o-mini",
            messages=messages(asked["q"]),
            max_tokens=400,
            stream=True,
            extra_headers={"x-standin": asked.get("standin", "")},
        ) as chunks:
            for chunk in chunks:
                if chunk.choices:
                    yield chunk.choices[0].delta.content or ""

    return flask.Response(words(), mimetype="text/plain", headers={"x-pid": str(os.getpid())})

"""The apps under test: a Starlette route that answers 570 bytes without an upstream call, bare and guarded."""

from __future__ import annotations

import os

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

ANSWER = b'{"answer": "' + b"x" * 556 + b'"}'


async def answer(request: Request) -> Response:
    await request.body()
    return Response(ANSWER, media_type="application/json")


def _app() -> Starlette:
    return Starlette(routes=[Route("/api/chat", answer, methods=["POST"])])


def bare() -> Starlette:
    return _app()


def guarded() -> Starlette:
    from llm_guard_mw import GuardMiddleware, load_config

    app = _app()
    config = load_config(
        {
            "store": os.environ.get("BENCH_STORE", "sqlite:///bench.db"),
            "ledger": "sqlite:///bench.db",
            "identity": {"user": ["header:x-user-id"], "trusted_proxies": ["127.0.0.1"]},
            "routes": [
                {
                    "path": "/api/chat",
                    "name": "chat",
                    "feature": "chat",
                    "model": "gpt-4o-mini",
                    "limits": [
                        "1M requests/minute per user",
                        "4000M tokens/minute per user",
                        "$100000/month per user",
                    ],
                }
            ],
        }
    )
    app.add_middleware(GuardMiddleware, config=config)
    return app

"""The apps under test: a Starlette route that answers 570 bytes without an upstream call, bare and guarded."""

from __future__ import annotations

import json
import os

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

TEXT = (
    "The tides follow the moon, which pulls at the near side of the sea more than at the earth beneath it, and at the"
    " earth more than at the far side. So two bulges stand opposite each other, and the turning earth carries every"
    " coast through both of them in a little less than twenty-five hours. Twice a month the sun pulls along the same"
    " line, and the water rises higher and falls lower than before. In bays that narrow towards the land the same wave"
    " is squeezed until it stands as high as a house, while in the middle of the ocean nobody would notice it at all."
)
ANSWER = json.dumps({"answer": TEXT[:556]}).encode()


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

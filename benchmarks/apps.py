"""The apps under test: a Starlette route that answers 570 bytes without an upstream call, bare, guarded, and limited.

BENCH_STORE names the store; each app has three limits that are never reached.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

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


def _app(endpoint: Callable[[Request], Awaitable[Response]] = answer) -> Starlette:
    return Starlette(routes=[Route("/api/chat", endpoint, methods=["POST"])])


def bare() -> Starlette:
    return _app()


CONFIG = {
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


def guarded() -> Starlette:
    from llm_guard_mw import GuardMiddleware

    app = _app()
    app.add_middleware(GuardMiddleware, config=CONFIG)
    return app


#: What the peers count: requests alone, in fixed windows, which are the cheapest that `limits` has.
PEER_LIMITS = ("1000000/minute", "100000000/hour", "1000000000/day")


def slowapi() -> Starlette:
    from slowapi import Limiter, _rate_limit_exceeded_handler
    from slowapi.errors import RateLimitExceeded

    limiter = Limiter(key_func=_user, storage_uri=os.environ["BENCH_STORE"])
    app = _app(limiter.limit(";".join(PEER_LIMITS))(answer))
    app.state.limiter = limiter
    app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)
    return app


def _user(request: Request) -> str:
    return request.headers["x-user-id"]


def limits() -> Starlette:
    app = _app()
    app.add_middleware(Limits)
    return app


class Limits:
    """As small as a pure ASGI middleware over the async strategy of `limits` can be."""

    def __init__(self, app: ASGIApp) -> None:
        from limits import parse
        from limits.aio.storage import RedisStorage
        from limits.aio.strategies import FixedWindowRateLimiter

        self.app = app
        self.strategy = FixedWindowRateLimiter(
            RedisStorage("async+" + os.environ["BENCH_STORE"], implementation="redispy")
        )
        self.items = [parse(limit) for limit in PEER_LIMITS]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        user = dict(scope["headers"])[b"x-user-id"].decode("latin-1")
        for item in self.items:
            if not await self.strategy.hit(item, user):
                await Response("too many requests", 429)(scope, receive, send)
                return
        await self.app(scope, receive, send)

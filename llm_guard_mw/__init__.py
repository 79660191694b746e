"""The spend guard in front of AI routes: quotas and budgets held before, exact usage settled after.

app.add_middleware(GuardMiddleware, config="llm_guard.toml")     # ASGI: FastAPI, Starlette, ...
app.wsgi_app = WSGIGuardMiddleware(app.wsgi_app, config=...)     # WSGI: Flask, ...
client = capture(AsyncOpenAI())                                  # every call of this client is held and metered
current_call()                                                   # in a handler: who is calling, record, charge
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llm_guard_mw.errors import ConfigError, GuardError, IdentityError, LimitExceeded, StoreUnavailable

if TYPE_CHECKING:
    from llm_guard_mw.asgi import GuardMiddleware
    from llm_guard_mw.call import current_call
    from llm_guard_mw.capture import capture
    from llm_guard_mw.config import load_config
    from llm_guard_mw.metering import read_usage
    from llm_guard_mw.process import AsyncGuard, Guard
    from llm_guard_mw.views import guarded
    from llm_guard_mw.wsgi import WSGIGuardMiddleware

__all__ = [
    "AsyncGuard",
    "ConfigError",
    "Guard",
    "GuardError",
    "GuardMiddleware",
    "IdentityError",
    "LimitExceeded",
    "StoreUnavailable",
    "WSGIGuardMiddleware",
    "capture",
    "current_call",
    "guarded",
    "load_config",
    "read_usage",
]

__version__ = "0.1.0"

#: Where each name lives. Loaded at its first use, so that a script that only captures does not pay for the rest.
_HOMES = {
    "AsyncGuard": "llm_guard_mw.process",
    "Guard": "llm_guard_mw.process",
    "GuardMiddleware": "llm_guard_mw.asgi",
    "WSGIGuardMiddleware": "llm_guard_mw.wsgi",
    "capture": "llm_guard_mw.capture",
    "current_call": "llm_guard_mw.call",
    "guarded": "llm_guard_mw.views",
    "load_config": "llm_guard_mw.config",
    "read_usage": "llm_guard_mw.metering",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    # A submodule of the same name (`capture`) would otherwise hide the function after its import.
    globals()[name] = value
    return value

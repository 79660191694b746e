"""The door for Django, sync and async.

INSTALLED_APPS = [..., "llm_guard_mw.django"]                       # `manage.py check` reads the configuration
MIDDLEWARE = ["llm_guard_mw.django.GuardMiddleware", ...]
LLM_GUARD = BASE_DIR / "llm_guard.toml"                             # or a dict of the same shape
"""

from __future__ import annotations

from llm_guard_mw.django.middleware import GuardMiddleware

__all__ = ["GuardMiddleware"]

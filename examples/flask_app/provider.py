"""Which provider the example talks to: the real one if its key is in the environment, else the bundled stand-in."""

from __future__ import annotations

import os

STANDIN_URL = os.environ.get("STANDIN_URL", "http://127.0.0.1:8001")


def use_standin_where_no_key_is_set() -> None:
    """Point each SDK that has no key at the stand-in, through the variables that the SDK reads anyway."""
    for key, base_url, path in (
        ("OPENAI_API_KEY", "OPENAI_BASE_URL", "/v1"),
        ("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", ""),
        ("GEMINI_API_KEY", "GOOGLE_GEMINI_BASE_URL", ""),
    ):
        if not os.environ.get(key):
            os.environ[key] = "stand-in"
            os.environ[base_url] = STANDIN_URL + path

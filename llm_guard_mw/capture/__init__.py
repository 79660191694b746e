"""Capture: guard and meter what an SDK's client sends, without a change in the code that uses it.

    client = capture(AsyncOpenAI())

Clients are recognised by their shape: no SDK is imported here.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, TypeVar

from llm_guard_mw.capture import httpx, requests
from llm_guard_mw.capture.aiohttp import capture_sessions

__all__ = ["capture"]

Client = TypeVar("Client")


def capture(client: Client) -> Client:
    """Guard a client in place and give it back: every call that it and its copies send from now on is held and metered.

    Takes the clients of openai, anthropic and google-genai, sync and async, bare clients of httpx2 and httpx, and
    sessions of requests.
    A client that is captured twice is guarded once. Which guard that is, is asked at the first call.
    """
    if httpx.is_client(client):
        httpx.capture_client(client)
    elif httpx.is_client(inner := getattr(client, "_client", None)):  # openai, anthropic
        httpx.capture_client(inner)
    elif hasattr(api := getattr(client, "_api_client", None), "_httpx_client"):  # google-genai, and its `.aio`
        _capture_google(api)
    elif requests.is_session(client):
        requests.capture_session(client)
    else:
        raise TypeError(
            f"capture({type(client).__module__}.{type(client).__name__}): a client of openai, anthropic, google-genai,"
            " httpx2, httpx or requests would be right"
        )
    return client


def _capture_google(api: Any) -> None:
    """Its sync calls go through an httpx client, its async ones through aiohttp, or httpx where that is missing."""
    for client in (api._httpx_client, api._async_httpx_client):
        if httpx.is_client(client):
            httpx.capture_client(client)
    if hasattr(api, "_get_aiohttp_session"):
        capture_sessions(api)


class _CallableModule(ModuleType):
    """`llm_guard_mw.capture` names a function and this package: it works whichever of the two an import finds."""

    def __call__(self, client: Client) -> Client:
        return capture(client)


sys.modules[__name__].__class__ = _CallableModule

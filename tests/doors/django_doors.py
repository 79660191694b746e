"""Django behind its own middleware, as doors for the scenarios: sync under WSGI, async under ASGI."""

from __future__ import annotations

import concurrent.futures
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any
from wsgiref.validate import validator

from asgiref.sync import async_to_sync

from llm_guard_mw import current_call
from llm_guard_mw.cli.demo.standin import StandIn
from tests.doors import django_project  # noqa: F401 - Django is set up before anything of it is imported
from tests.doors.harness import AsgiDoor, Door, Later, Reply, Say, Sent, SignIn, Words, _SyncWork, _Work, drive_wsgi

from django.core.handlers.asgi import ASGIHandler  # isort: skip
from django.core.handlers.wsgi import WSGIHandler  # isort: skip
from django.http import HttpResponse, StreamingHttpResponse  # isort: skip
from django.test.utils import override_settings  # isort: skip
from django.urls import path as url  # isort: skip


def django_settings(config: Mapping[str, Any], views: Mapping[str, Any]) -> Any:
    """What handlers raise passes to the server, as it does in the other doors."""
    patterns = tuple(url(path.removeprefix("/"), view) for path, view in views.items())
    return override_settings(LLM_GUARD=config, ROOT_URLCONF=patterns, DEBUG_PROPAGATE_EXCEPTIONS=True)


class DjangoDoor(Door):
    """Django's WSGI handler, watched over by PEP 3333's validator."""

    name = "django"

    def __init__(self, config: Mapping[str, Any], handlers: Mapping[str, Sequence[Any]], provider: StandIn, url: str):
        super().__init__(config, handlers, provider, url)
        views = {path: functools.partial(self._serve, path) for path in self.handlers}
        self.settings = django_settings(config, views)
        self.settings.enable()
        strict = validator(WSGIHandler())

        def door(environ: Any, start_response: Any) -> Any:
            # Django reads no body without a length, as PEP 3333 has it: its servers give chunked ones one.
            length = str(environ["wsgi.input"].getbuffer().nbytes)
            return strict({"CONTENT_LENGTH": length, **environ}, start_response)

        self.app: Any = door

    def close(self) -> None:
        self.settings.disable()
        super().close()

    def together(self, *requests: Sent) -> list[Reply]:
        with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(functools.partial(drive_wsgi, self.app), requests))

    def _serve(self, path: str, request: Any) -> Any:
        seen = _seen(request)
        self.seen.append(seen)
        work = _DjangoWork(self, request)
        for step in self.handlers[path]:
            work.perform(step)
        return work.answer()


class AsyncDjangoDoor(AsgiDoor):
    """Django's ASGI handler, with async views."""

    name = "django-async"

    def __init__(self, config: Mapping[str, Any], handlers: Mapping[str, Sequence[Any]], provider: StandIn, url: str):
        super().__init__(config, handlers, provider, url)
        self.settings = django_settings(config, {path: self._view(path) for path in self.handlers})
        self.settings.enable()
        self.app = ASGIHandler()

    def close(self) -> None:
        self.settings.disable()
        super().close()

    def _view(self, path: str) -> Any:
        async def serve(request: Any) -> Any:
            seen = _seen(request)
            self.seen.append(seen)
            work = _AsyncDjangoWork(self, request)
            for step in self.handlers[path]:
                await work.perform(step)
            return work.answer()

        return serve


def _seen(request: Any) -> dict[str, Any]:
    call = current_call()
    headers = {name.lower(): value for name, value in request.headers.items()}
    return {"headers": headers, "body": request.body, "call": None if call is None else call.id}


class _DjangoWork(_SyncWork):
    def __init__(self, door: DjangoDoor, request: Any) -> None:
        super().__init__(door)  # type: ignore[arg-type] # what it asks of its door, this one has
        self.request = request

    def answer(self) -> Any:
        body = json.dumps({"said": self.said}).encode()
        response: Any = self.response or HttpResponse(body, content_type="application/json")
        if self.later is not None:
            response._resource_closers.append(functools.partial(self._after, self.later))
        return response

    def perform(self, step: Any) -> None:
        match step:
            case Say():
                self.response = _response(step)
            case SignIn():
                _sign_in(self.request)
            case Words():
                self.response = StreamingHttpResponse(self._words(step), content_type="text/plain")
            case _:
                super().perform(step)


class _AsyncDjangoWork(_Work):
    def answer(self) -> Any:
        body = json.dumps({"said": self.said}).encode()
        response: Any = self.response or HttpResponse(body, content_type="application/json")
        if self.later is not None:
            response._resource_closers.append(functools.partial(async_to_sync(self._after), self.later))
        return response

    async def perform(self, step: Any) -> None:
        match step:
            case Say():
                self.response = _response(step, is_async=True)
            case SignIn():
                _sign_in(self.request)
            case Words():
                self.response = StreamingHttpResponse(  # type: ignore[assignment] # a response all the same
                    self._words(step), content_type="text/plain"
                )
            case Later():
                self.later = step
            case _:
                await super().perform(step)


def _sign_in(request: Any) -> None:
    if "x-session" in request.headers:
        request.user = request.headers["x-session"]


def _response(say: Say, *, is_async: bool = False) -> Any:
    if isinstance(say.body, list):

        async def pieces() -> Any:
            for piece in say.body:
                yield piece

        content = pieces() if is_async else iter(say.body)
        return StreamingHttpResponse(content, status=say.status, content_type=say.kind or "text/plain")
    body = say.body if isinstance(say.body, bytes) else json.dumps(say.body or {}).encode()
    return HttpResponse(body, status=say.status, content_type=say.kind or "application/json")


DJANGO_DOORS: Sequence[type[Door]] = (DjangoDoor, AsyncDjangoDoor)

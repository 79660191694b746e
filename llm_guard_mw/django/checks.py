"""The system check: what `llm-guard-mw check` says of a configuration, and what only Django can know of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any  # what Django hands to a check

from django.conf import settings
from django.core import checks
from django.urls import is_valid_path

from llm_guard_mw.config import Config, load_config
from llm_guard_mw.django.middleware import configured
from llm_guard_mw.errors import ConfigError
from llm_guard_mw.process import CONFIG_VARIABLE, DEFAULT_CONFIG

MIDDLEWARE = "llm_guard_mw.django.GuardMiddleware"


def check_configuration(app_configs: Any = None, **_: Any) -> list[Any]:
    """Every mistake of the configuration is an error, and every warning a warning, with their fixes as hints."""
    source = configured()
    if source is None:
        source = os.environ.get(CONFIG_VARIABLE, DEFAULT_CONFIG)
    try:
        loaded = source if isinstance(source, Config) else load_config(source, check=True)
    except ConfigError as error:
        return [_message(checks.Error, "E001", each.where, each.problem, each.fix) for each in error.mistakes]
    found = [_message(checks.Warning, "W001", each.where, each.problem, each.fix) for each in loaded.warnings]
    return [*found, *_of_django(loaded)]


def _of_django(loaded: Config) -> Iterator[Any]:
    if MIDDLEWARE not in settings.MIDDLEWARE:
        yield _message(checks.Warning, "W002", "MIDDLEWARE", "nothing is guarded", f'put "{MIDDLEWARE}" in front')
    for route in loaded.policy.routes:
        path = route.samples()[0]
        if is_valid_path(path):
            continue
        other = f"{path}/" if not path.endswith("/") else path.rstrip("/")
        fix = f'write "{other}"' if is_valid_path(other) else "name a path that the URLconf has"
        yield _message(checks.Warning, "W003", f"route {route.name}", f'no view answers "{path}"', fix)


def _message(kind: Any, number: str, where: str, problem: str, fix: str) -> Any:
    return kind(problem, hint=fix or None, obj=where, id=f"llm_guard_mw.{number}")

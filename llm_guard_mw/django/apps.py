"""What Django finds under INSTALLED_APPS: an app without models, whose checks read the guard's configuration."""

from __future__ import annotations

from django.apps import AppConfig
from django.core.checks import register

from llm_guard_mw.django.checks import check_configuration


class GuardConfig(AppConfig):  # type: ignore[misc] # Django has no types
    name = "llm_guard_mw.django"
    label = "llm_guard_mw"
    verbose_name = "LLM guard"

    def ready(self) -> None:
        register(check_configuration)

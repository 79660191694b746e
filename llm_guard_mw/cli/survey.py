"""The app that a command is given as `module:app`, and what its views say."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from llm_guard_mw.config import Config
from llm_guard_mw.directory import UNSEEN, ViewRule, router_of, survey
from llm_guard_mw.errors import ConfigError, Mistake


def survey_of(named: str, config: Config | None) -> tuple[Sequence[ViewRule], Sequence[Mistake]]:
    """The marked views of an app, and what should be known of them.

    Raises ConfigError with the mistakes in `@guarded`, LookupError with a reason if there is no such app.
    """
    app = _load(named)
    if config is None:  # the file is wrong: only the app's own mistakes can be told
        return (), ()
    if router_of(app) is None:
        raise LookupError(f"{named} is no app of Flask, Django, Starlette or FastAPI that can be looked into")
    views, unseen = survey(config.policy, app)
    notes = [Mistake(str(view.route.view), what, "") for view in views for what in view.overruled]
    notes += [Mistake(mark.where, f"no route leads to {mark.title}, which is marked", UNSEEN) for mark in unseen]
    return views, notes


def _load(named: str) -> Any:  # whatever a framework calls an app
    module, colon, path = named.partition(":")
    if not module or not colon or not path:
        raise LookupError(f'--app {named} names no app: write "module:app", or "module:make()" of a function')
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = import_module(module)
        for name in path.removesuffix("()").split("."):
            found = getattr(found, name)
        return found() if path.endswith("()") else found
    except ConfigError:
        raise
    except Exception as error:  # whatever the app does when it is imported
        raise LookupError(f"{named} cannot be loaded: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(Path.cwd()))

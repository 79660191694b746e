"""Flask behind the WSGI door: its session, and flask_login's user, laid where identity looks for them.

    [identity]
    user = ["scope:user.id"]        # flask_login's current_user; one of the defaults
    user = ["session:user_id"]      # what the app itself keeps in Flask's session

Both exist only while Flask handles the request, and the environ has neither; so Flask's own signals are followed.

Rule 1. As a guarded request begins, the session and the way to the user are laid into its environ.
Rule 2. Before Flask forgets them, whoever is not known yet is asked for: a stream that is read later, and a call
        that asked no provider, belong to somebody all the same.
Rule 3. Nothing here raises into the app.
"""

from __future__ import annotations

import sys
from typing import Any  # whatever a signal says besides

from llm_guard_mw.call import Call, current_call
from llm_guard_mw.guard import Guard
from llm_guard_mw.logs import log
from llm_guard_mw.process import install


def follow_flask() -> None:
    """Follow the requests of the Flask apps in this process, if it has any. Following twice changes nothing."""
    if "flask" not in sys.modules:  # whoever puts a door around an app of Flask has imported it
        return
    import flask

    flask.request_started.connect(_begins)
    flask.request_finished.connect(_ends)
    flask.got_request_exception.connect(_ends)


def _begins(app: Any, **_: Any) -> None:
    call = _call_of_this_request()
    if call is None or call.request is None:
        return
    try:
        environ: Any = call.request.surroundings
        environ.setdefault("session", _flask().session._get_current_object())
        if getattr(app, "login_manager", None) is not None and "flask_login" in sys.modules:
            environ.setdefault("user", sys.modules["flask_login"].current_user)  # looks each time it is asked
    except Exception:
        log.exception("flask_not_followed")


def _ends(app: Any, **_: Any) -> None:
    call = _call_of_this_request()
    if call is None:
        return
    try:
        Guard(install().desk).ask_now(call)
    except Exception:
        log.exception("flask_not_followed")


def _call_of_this_request() -> Call | None:
    """The current call, unless Flask is handling a request within its request (a test client in a view)."""
    call = current_call()
    if call is None or call.request is None:
        return None
    # A middleware in between may have copied the environ, but not what it holds.
    its, ours = _flask().request.environ.get("wsgi.input"), call.request.surroundings.get("wsgi.input")
    return call if its is ours else None


def _flask() -> Any:
    return sys.modules["flask"]

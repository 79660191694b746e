"""`apps.py` once more for WSGI: a Flask view that answers 570 bytes, bare, guarded, and behind Flask-Limiter."""

from __future__ import annotations

import os

import flask

from benchmarks.apps import ANSWER, CONFIG, PEER_LIMITS


def bare() -> flask.Flask:
    app = flask.Flask(__name__)

    @app.post("/api/chat")
    def answer() -> flask.Response:
        flask.request.get_data()
        return flask.Response(ANSWER, mimetype="application/json")

    return app


def guarded() -> flask.Flask:
    from llm_guard_mw import WSGIGuardMiddleware

    app = bare()
    app.wsgi_app = WSGIGuardMiddleware(app.wsgi_app, config=CONFIG)  # type: ignore[method-assign]  # Flask's idiom
    return app


def limiter() -> flask.Flask:
    from flask_limiter import Limiter

    app = bare()
    Limiter(
        lambda: flask.request.headers["x-user-id"],
        app=app,
        storage_uri=os.environ["BENCH_STORE"],
        default_limits=list(PEER_LIMITS),
    )
    return app

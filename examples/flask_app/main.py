"""A small AI product on Flask behind a spend guard: people log in, guests try it out, and see what they have left.

The lines marked with a number are all that guards it; the views look as they would without.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import provider
from ai import ai
from flask import Flask, abort, redirect, render_template, request, session, url_for
from flask_login import LoginManager, UserMixin, current_user, login_user, logout_user
from werkzeug.wrappers import Response

from llm_guard_mw import Guard, WSGIGuardMiddleware  # 1

provider.use_standin_where_no_key_is_set()

app = Flask(__name__)
app.wsgi_app = WSGIGuardMiddleware(app.wsgi_app, config=Path(__file__).with_name("llm_guard.toml"))  # 2
app.config.update(
    SECRET_KEY=os.environ.get("SECRET_KEY") or secrets.token_hex(32),  # several workers have to share one
    SESSION_COOKIE_SAMESITE="Lax",
)
app.register_blueprint(ai, url_prefix="/ai")


# ---------------------------------------------------------------- who is calling: an app's own business


class Person(UserMixin):
    """What flask_login knows of somebody; llm_guard.toml reads `id`, `team` and `plan`."""

    def __init__(self, name: str, team: str, plan: str) -> None:
        self.id, self.team, self.plan = name, team, plan


#: A real app has a database, and passwords.
PEOPLE = {"ada": Person("ada", "acme", "pro"), "bob": Person("bob", "acme", "free")}

login_manager = LoginManager(app)
login_manager.user_loader(PEOPLE.get)


@app.before_request
def guests_have_a_name() -> None:
    """Whoever has not logged in is somebody as well: a number in Flask's signed session."""
    if "guest" not in session:
        session["guest"] = f"guest-{secrets.token_hex(8)}"


@app.post("/login")
def login() -> Response:
    login_user(PEOPLE.get(request.form.get("name", "")) or abort(401))
    return redirect(url_for("budget"))


@app.post("/logout")
def logout() -> Response:
    logout_user()
    return redirect(url_for("budget"))


# ---------------------------------------------------------------- what is left to them


@app.get("/")
def budget() -> str:
    if current_user.is_authenticated:
        who = {"user": current_user.id, "tenant": current_user.team, "tier": current_user.plan}
    else:
        who = {"user": session["guest"]}
    mine = [each for each in Guard().allowances(**who) if "global" not in each.scope]
    return render_template("budget.html", name=who["user"], allowances=mine)


@app.get("/health")
def health() -> dict[str, bool]:
    return {"ok": True}

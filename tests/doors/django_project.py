"""Django, set up for this process as a project would be: users and sessions in a database file of its own."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

import django
from django.conf import settings

_folder = Path(tempfile.mkdtemp(prefix="django-"))
atexit.register(shutil.rmtree, _folder, ignore_errors=True)

MIDDLEWARE = (
    "llm_guard_mw.django.GuardMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
)

if not settings.configured:
    settings.configure(
        SECRET_KEY="a test's own",
        ALLOWED_HOSTS=["*"],
        USE_TZ=True,
        ROOT_URLCONF=(),
        MIDDLEWARE=list(MIDDLEWARE),
        INSTALLED_APPS=[
            "django.contrib.contenttypes",
            "django.contrib.auth",
            "django.contrib.sessions",
            "llm_guard_mw.django",
        ],
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(_folder / "project.db")}},
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    )
    django.setup()

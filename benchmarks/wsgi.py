"""A Flask view behind gunicorn (gthread, 16 threads): bare, guarded, and behind Flask-Limiter; as `middleware` does it.

Flask-Limiter counts requests in three windows, one round trip to Redis each. What the guard does besides, and what
the columns are, stands in `middleware`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import middleware


def main(arguments: Sequence[str] = ()) -> None:
    sides = ",".join(name for name, side in middleware.SIDES.items() if side.server == "gunicorn")
    middleware.main(["--sides", sides, "--clients", "1,16", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])

"""Run every benchmark. The figures are directional: quote the ratios, and say on what they were measured."""

from __future__ import annotations

import os
import platform

from benchmarks import drain, first_byte, metering, middleware, stores, wsgi

if __name__ == "__main__":
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}\n")
    for benchmark in (middleware, wsgi, first_byte, stores, drain, metering):
        print(benchmark.__doc__)
        benchmark.main()
        print()

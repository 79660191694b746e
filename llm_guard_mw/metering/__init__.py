"""Metering: what an exchange used, read off the bytes of its answer.

`Meter` watches an answer go by, `read_usage` reads a recorded one, `identify_api` says what an outgoing request is.
The rules of each provider are in docs/explanation/metering.md.
"""

from __future__ import annotations

from llm_guard_mw.metering.billed import BilledResponses
from llm_guard_mw.metering.meter import Meter, read_usage
from llm_guard_mw.metering.outgoing import identify_api

__all__ = ["BilledResponses", "Meter", "identify_api", "read_usage"]

"""Metering: what an exchange used, read off the bytes of its answer.

`Meter` watches an answer go by, `read_usage` reads a recorded one, `identify_api` says what an outgoing request is.
The rules of each provider are in docs/explanation/metering.md.
"""

from __future__ import annotations

from llm_guard_mw.metering.billed import BilledResponses
from llm_guard_mw.metering.dialects import DIALECTS
from llm_guard_mw.metering.dialects.bedrock_invoke import count_headers
from llm_guard_mw.metering.meter import Meter, read_usage
from llm_guard_mw.metering.outgoing import PROVIDER_NAMES, identify_api

#: The names of the formats that are read.
API_NAMES = tuple(DIALECTS)

__all__ = ["API_NAMES", "PROVIDER_NAMES", "BilledResponses", "Meter", "count_headers", "identify_api", "read_usage"]

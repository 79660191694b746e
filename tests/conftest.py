"""What every test starts and ends with: no guard in the process, and logging as it was."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """The command line configures logging for its process, which here is everybody's."""
    loggers = [logging.getLogger(), logging.getLogger("llm_guard")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]

    yield

    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
    structlog.reset_defaults()

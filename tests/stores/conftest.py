"""A real server, and a faulty proxy in front of it, for the tests of the Redis store's links."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.model import servers
from tests.stores.faulty_proxy import FaultyProxy


@pytest.fixture
def server() -> servers.Server:
    """An emptied server of the leg that a wheel always brings."""
    reason = servers.missing("valkey")
    if reason is not None:
        pytest.skip(reason)
    return servers.emptied("valkey")


@pytest.fixture
def proxy(server: servers.Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(server.port) as proxy:
        yield proxy

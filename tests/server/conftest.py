from collections.abc import Iterator

import pytest

from tests.server.live import LiveServer, run_live


@pytest.fixture(scope="package")
def server() -> Iterator[LiveServer]:
    """Without keys and limits; tests leave it as it was."""
    with run_live() as live:
        yield live


@pytest.fixture(autouse=True)
def leave_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did: no request is left in the engine."""
    yield
    if "server" in request.fixturenames:
        live = request.getfixturevalue("server")
        live.wait_idle()

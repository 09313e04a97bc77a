from collections.abc import Iterator

import pytest

from tests.hub.hub_server import Hub, serve_hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as hub:
        yield hub

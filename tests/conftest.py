"""Settings of all tests, and the choice of kernels."""

from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from tramontane.kernels import extension
from tramontane.kernels.dispatch import get_kernels

# A busy machine must not fail a property, and a failure must be seen again by the next person.
settings.register_profile("tramontane", deadline=None, derandomize=True)
settings.load_profile("tramontane")


@pytest.fixture
def choose_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Call with a backend's name: from then on the test runs with it."""

    def choose(name: str) -> None:
        if name == "native" and not extension.is_available():
            pytest.skip("the native kernels have not been built")
        monkeypatch.setenv("TRAMONTANE_KERNELS", name)
        get_kernels.cache_clear()

    yield choose
    get_kernels.cache_clear()

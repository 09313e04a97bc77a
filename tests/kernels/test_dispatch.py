"""Choosing the implementation of the kernels."""

from collections.abc import Iterator
from inspect import signature

import pytest

from tramontane.errors import ConfigError
from tramontane.kernels import extension, fused, native, reference
from tramontane.kernels.dispatch import get_kernels


@pytest.fixture(autouse=True)
def _forget_choice() -> Iterator[None]:
    get_kernels.cache_clear()
    yield
    get_kernels.cache_clear()


@pytest.mark.parametrize("is_built", [False, True])
def test_default_is_the_fastest_there_is(monkeypatch: pytest.MonkeyPatch, is_built: bool) -> None:
    monkeypatch.delenv("TRAMONTANE_KERNELS", raising=False)
    monkeypatch.setattr(extension, "is_available", lambda: is_built)
    assert get_kernels() is (native if is_built else fused)


def test_native_that_has_not_been_built_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAMONTANE_KERNELS", "native")
    monkeypatch.setattr(extension, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="has not been built"):
        get_kernels()


def test_environment_chooses_and_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRAMONTANE_KERNELS", "reference")
    with caplog.at_level("INFO"):
        assert get_kernels() is reference
        assert get_kernels() is reference
    assert [record.getMessage() for record in caplog.records] == [
        "kernels: reference (TRAMONTANE_KERNELS)"
    ]


def test_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAMONTANE_KERNELS", "magic")
    with pytest.raises(ConfigError, match=r"'magic'.*fused.*reference"):
        get_kernels()


@pytest.mark.parametrize("name", native.__all__)
def test_all_have_the_same_functions(name: str) -> None:
    parameters = [list(signature(getattr(module, name)).parameters)
                  for module in (reference, fused, native)]  # fmt: skip
    assert parameters[0] == parameters[1] == parameters[2]

"""Choosing the implementation of the kernels."""

from collections.abc import Iterator

import pytest

from tramontane.errors import ConfigError
from tramontane.kernels import fused, reference
from tramontane.kernels.dispatch import get_kernels


@pytest.fixture(autouse=True)
def _forget_choice() -> Iterator[None]:
    get_kernels.cache_clear()
    yield
    get_kernels.cache_clear()


def test_default_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRAMONTANE_KERNELS", raising=False)
    assert get_kernels() is fused


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


def test_both_have_the_same_functions() -> None:
    names = ["causal_attention", "linear_cross_entropy", "moe_experts", "packed_attention",
             "rms_norm", "rotate"]  # fmt: skip
    for name in names:
        assert callable(getattr(fused, name))
        assert callable(getattr(reference, name))

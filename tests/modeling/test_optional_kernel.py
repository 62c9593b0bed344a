"""A kernel that fails once is not tried again, and the log says so."""

import pytest
import torch

from dijiang.modeling import optional_kernel
from dijiang.modeling.optional_kernel import OptionalKernel


@pytest.fixture
def lines(monkeypatch):
    """What is logged."""
    logged = []
    for name in ("info_once", "warning_once"):
        monkeypatch.setattr(optional_kernel.logger, name, logged.append)
    return logged


def fails():
    raise RuntimeError("no compiler")


def test_a_result_passes_through(lines):
    kernel = OptionalKernel("sums run fast", "sums run slowly: the kernel fails")
    assert kernel.usable and kernel.run(lambda: 3) == 3 and kernel.usable
    assert lines == ["sums run fast"]
    assert kernel.run(lambda: None) is None and kernel.usable


def test_the_first_failure_is_remembered_and_logged(lines):
    kernel = OptionalKernel("sums run fast", "sums run slowly: the kernel fails")
    assert kernel.run(fails) is None
    assert not kernel.usable and str(kernel.failure) == "no compiler"
    assert lines == ["sums run slowly: the kernel fails (RuntimeError: no compiler)"]


def test_running_out_of_memory_is_raised():
    def is_full():
        raise torch.OutOfMemoryError

    kernel = OptionalKernel("sums run fast", "sums run slowly: the kernel fails")
    with pytest.raises(torch.OutOfMemoryError):
        kernel.run(is_full)
    assert kernel.usable


def test_a_kernel_can_be_turned_off():
    kernel = OptionalKernel("sums run fast", "sums run slowly: the kernel fails")
    kernel.enabled = False
    assert not kernel.usable

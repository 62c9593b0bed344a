"""The float type is chosen by a measurement."""

import pytest
import torch

from dijiang.common import device
from dijiang.common.device import fastest_dtype


@pytest.fixture(autouse=True)
def not_measured_yet():
    device.faster_in_products.cache_clear()
    yield
    device.faster_in_products.cache_clear()


@pytest.mark.parametrize(("half_takes", "expected"), [(0.5, torch.bfloat16), (2.0, torch.float32), (1.0, torch.float32)])
def test_the_faster_type_wins(monkeypatch, half_takes, expected):
    seconds = {torch.float32: 1.0, torch.bfloat16: half_takes}
    asked = []
    monkeypatch.setattr(device, "seconds_per_product", lambda *of: asked.append(of) or seconds[of[1]])
    assert fastest_dtype("cpu") == fastest_dtype(torch.device("cpu")) == expected
    cpu = torch.device("cpu")
    assert asked == [(cpu, dtype, size) for size in (128, 256, 512, 1024) for dtype in seconds]  # once


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
def test_products_that_are_far_slower_are_not_tried_at_larger_sizes(monkeypatch, slow):
    """Processors without products in bfloat16 took a second for each of 1,024."""
    sizes = []
    monkeypatch.setattr(
        device, "seconds_per_product", lambda of, dtype, size: sizes.append(size) or (1 + size * (dtype == slow))
    )
    assert fastest_dtype("cpu") == (torch.bfloat16 if slow == torch.float32 else torch.float32)
    assert sizes == [128, 128]


def test_gpus_without_bfloat16_compute_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(device, "seconds_per_product", lambda device, dtype: pytest.fail("measured in vain"))
    assert fastest_dtype("cuda") == torch.float32


def test_the_measurement_itself(monkeypatch):
    assert fastest_dtype("cpu") in (torch.float32, torch.bfloat16)
    assert 0 < device.seconds_per_product(torch.device("cpu"), torch.bfloat16, 64) < 1

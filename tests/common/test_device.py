"""The float type is chosen by a measurement."""

import pytest
import torch

from dijiang.common import device
from dijiang.common.device import fastest_dtype


@pytest.mark.parametrize(("half_takes", "expected"), [(0.5, torch.bfloat16), (2.0, torch.float32), (1.0, torch.float32)])
def test_the_faster_type_wins(monkeypatch, half_takes, expected):
    seconds = {torch.float32: 1.0, torch.bfloat16: half_takes}
    asked = []
    monkeypatch.setattr(device, "seconds_per_product", lambda device, dtype: asked.append(device) or seconds[dtype])
    assert fastest_dtype("cpu") == fastest_dtype(torch.device("cpu")) == expected
    assert set(asked) == {torch.device("cpu")}


def test_gpus_without_bfloat16_compute_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(device, "seconds_per_product", lambda device, dtype: pytest.fail("measured in vain"))
    assert fastest_dtype("cuda") == torch.float32


def test_the_measurement_itself(monkeypatch):
    monkeypatch.setattr(device, "PRODUCT_SIZE", 64)
    assert fastest_dtype("cpu") in (torch.float32, torch.bfloat16)
    assert 0 < device.seconds_per_product(torch.device("cpu"), torch.bfloat16) < 1

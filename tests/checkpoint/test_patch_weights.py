"""A copy of a checkpoint in which a few tensors are new, bit for bit the same in all others."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dijiang.checkpoint.patch_weights import copy_with_parameters


@pytest.fixture
def checkpoint(tmp_path):
    """Two shards of several dtypes, with odd bits in them, and small files beside."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    odd = torch.tensor([0x7FC1, 0xFF80, 0x8000], dtype=torch.uint16).view(torch.bfloat16)  # a NaN's payload, -inf, -0
    save_file({"a": torch.ones(2, 3), "odd": odd}, folder / "one.safetensors", metadata={"format": "pt", "by": "us"})
    save_file({"b": torch.ones(4), "half": torch.ones(2).half()}, folder / "two.safetensors")
    (folder / "config.json").write_bytes(b'{"x": 1}\r\n')
    (folder / "README.md").write_text("the model card of the model before", encoding="utf-8")
    (folder / "logs").mkdir()
    (tmp_path / "out").mkdir()
    return folder


def test_named_tensors_are_replaced_and_all_else_is_copied(checkpoint, tmp_path):
    out = tmp_path / "out"
    new = {"a": torch.arange(6.0).view(3, 2).T, "half": torch.nn.Parameter(torch.tensor([1.5, 1e-3]))}
    copy_with_parameters(checkpoint, out, new)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "one.safetensors", "two.safetensors"]
    assert (out / "config.json").read_bytes() == b'{"x": 1}\r\n'
    one, two = (load_file(out / f"{name}.safetensors") for name in ("one", "two"))
    assert torch.equal(one["a"], new["a"]) and torch.equal(two["b"], torch.ones(4))
    assert one["odd"].view(torch.uint16).tolist() == [0x7FC1, 0xFF80, 0x8000]
    assert two["half"].dtype == torch.float16 and two["half"].tolist() == torch.tensor([1.5, 1e-3]).half().tolist()
    with safe_open(out / "one.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "by": "us"}
    assert json.loads((checkpoint / "config.json").read_text()) == {"x": 1}
    assert torch.equal(load_file(checkpoint / "one.safetensors")["a"], torch.ones(2, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_parameters_that_are_not_finite(checkpoint, tmp_path, refused, value):
    new = {"b": torch.ones(4), "a": torch.full((2, 3), value)}
    message = "^a is not finite after training; lower learning_rate$"
    refused(tmp_path, lambda: copy_with_parameters(checkpoint, tmp_path / "out", new), message)


def test_parameters_that_the_checkpoint_lacks(checkpoint, tmp_path):
    new = {"z": torch.ones(1), "c": torch.ones(1), "a": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=r"checkpoint has no tensor c; convert the source again$"):
        copy_with_parameters(checkpoint, tmp_path / "out", new)

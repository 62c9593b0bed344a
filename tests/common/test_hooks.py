"""Hooks are removed however a block ends."""

import pytest
import torch

from dijiang.common.hooks import hooks


def test_hooks_work_inside_and_are_gone_afterwards():
    layer = torch.nn.Linear(2, 2)
    calls = []
    with hooks([layer.register_forward_pre_hook(lambda module, args: calls.append("pre")),
                layer.register_forward_hook(lambda module, args, output: calls.append("post"))]):  # fmt: skip
        layer(torch.ones(2))
    layer(torch.ones(2))
    assert calls == ["pre", "post"]


def test_hooks_are_gone_after_an_error_inside():
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(KeyboardInterrupt), hooks([layer.register_forward_hook(lambda *args: None)]):
        raise KeyboardInterrupt
    assert not layer._forward_hooks


def test_hooks_are_gone_after_an_error_while_they_are_registered():
    layer = torch.nn.Linear(2, 2)

    def handles():
        yield layer.register_forward_hook(lambda *args: None)
        raise KeyError("second")

    with pytest.raises(KeyError), hooks(handles()):
        pytest.fail("the block must not run")
    assert not layer._forward_hooks

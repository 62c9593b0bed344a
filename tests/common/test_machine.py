"""The machine and the command in results."""

import sys

import pytest
import torch

from dijiang.common import machine


@pytest.mark.parametrize("threads", [1, 2])
def test_the_machine_is_named(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        facts = machine.machine()
    finally:
        torch.set_num_threads(before)
    assert facts["threads"] == threads and facts["memory_bytes"] > 0


def test_commands_tell_no_folders(monkeypatch):
    words = ["/opt/bin/dijiang", "evaluate", "/home/me/model", "--text=/home/me/a b.txt", "--set", "data.train=/x/y", "a=b"]
    monkeypatch.setattr(sys, "argv", words)
    assert machine.own_command() == "dijiang evaluate model '--text=a b.txt' --set data.train=y a=b"
    monkeypatch.setattr(sys, "argv", ["/home/me/script.py", "x"])
    assert machine.own_command() is None

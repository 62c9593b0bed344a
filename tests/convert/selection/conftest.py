"""A tiny student with its teacher's weights, and samples of random tokens to select heads by."""

import pytest
import torch

from dijiang.common.recall import RecallSample
from dijiang.convert import load_source


@pytest.fixture
def teacher(pair):
    """The softmax model."""
    return load_source(pair.teacher)[0]


@pytest.fixture
def student(pair):
    """The teacher's weights in two linear layers of two key/value heads, with a short window and a loud linear branch."""
    settings = {"attention_window": 4, "attention_sinks": 2, "branch_scale_init": 0.5}
    return load_source(pair.teacher, layer_types="linear_attention", **settings)[0]


@pytest.fixture
def random_samples(tokens):
    """random_samples(count, length=24): samples whose last two tokens are one answer each."""

    def make(count: int, length: int = 24) -> list[RecallSample]:
        answers = [(length - 2, length - 1), (length - 1, length)]
        return [RecallSample(input_ids=ids, answers=answers, depths=[0.5, 0.5], chance=0.0) for ids in tokens(length, count)]

    return make


@pytest.fixture(autouse=True)
def one_thread():
    """The same sums in the same order, so that selections can be compared exactly."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

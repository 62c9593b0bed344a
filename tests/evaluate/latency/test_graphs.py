"""Decoding as a graph, whose step runs on a CPU without one."""

import torch

from dijiang.evaluate.latency.contenders import contenders_of
from dijiang.evaluate.latency.graphs import InPlaceStep, agreement, graphed_step, short_cache


def test_steps_in_place_decode_as_steps_do(both):
    contender = contenders_of(both)["dijiang"]
    torch.manual_seed(0)
    cache = short_cache(contender, 1, 40)
    step = InPlaceStep(contender, cache, contender.random_ids(1, 1), 40)
    before = [tensor.clone() for tensor in step.tensors()]
    replay = graphed_step(step)
    replayed = [replay()[0] for _ in range(6)]
    for tensor, value in zip(step.tensors(), before, strict=True):
        tensor.copy_(value)
    expected = []
    ids = step.ids.clone()
    for _ in range(6):
        ids = torch.tensor([contender.step(ids, cache)])
        expected.append(int(ids))
    assert replayed == expected and len(set(replayed)) > 1


def test_a_static_cache_takes_its_token_back(both):
    torch.manual_seed(1)
    contender = contenders_of(both)["softmax static"]
    cache = contender.filled_cache(2, 20)
    step = InPlaceStep(contender, cache, contender.random_ids(2, 1), 20)
    replay = graphed_step(step)
    assert agreement(step, replay) == 1.0
    replay()
    replay()
    assert int(cache.get_seq_length()) == 20

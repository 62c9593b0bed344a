"""The schedule of the learning rates, and what AdamW decays."""

import pytest
from dijiang_testing.training import FakeModel, stage_config

from dijiang.train.trainer.optimizer import adamw, learning_rate_factor


@pytest.mark.parametrize(("steps", "share"), [(1, 0.05), (10, 0.0), (10, 0.05), (37, 0.3), (10, 1.0)])
def test_the_schedule_stays_in_bounds_and_ends_low(steps, share):
    stage = stage_config(steps=steps, warmup_share=share, final_share=0.1)
    factors = [learning_rate_factor(step, stage) for step in range(steps + 1)]
    top = round(share * steps)
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[: top + 1] == sorted(factors[: top + 1]) and factors[top:] == sorted(factors[top:], reverse=True)
    if top < steps:
        assert factors[top] == 1 and factors[steps] == pytest.approx(0.1)


def test_kernels_and_vectors_do_not_decay():
    model = FakeModel()
    optimizer = adamw(model.parameter_groups(), stage_config(weight_decay=0.3))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, p in model.named_parameters() if decays.get(id(p))} == {"student.head.weight"}
    assert len(decays) == len(model.trained())

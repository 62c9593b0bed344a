"""From sensitivities of matrices to a plan."""

import pytest

from dijiang.compress import PruneConfig
from dijiang.compress.oneshot.config import POINTS
from dijiang.compress.oneshot.plan import make_plan
from dijiang.compress.oneshot.sensitivity.estimates import Sensitivities


def test_costs_of_a_layer_add_up():
    shapes = {"a": (4, 5), "b": (10, 2), "c": (5, 8)}
    costs = {name: [scale * share**2 for share in POINTS] for name, scale in (("a", 1), ("b", 3), ("c", 4))}
    sensitivities = Sensitivities(method="fisher", values=dict.fromkeys(shapes, 1.0), costs=costs)
    config = PruneConfig(calibration=("x",), allocation="loss", granularity="layer")
    plan = make_plan(shapes, {"a": 0, "b": 0, "c": 1}, sensitivities, config)
    assert plan.targets() == pytest.approx(dict.fromkeys(shapes, 0.5))  # two layers of one size and one cost

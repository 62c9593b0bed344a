"""Allocation by loss: the cheapest sparsities for curves that are known, and the curves themselves."""

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dijiang.compress import PruneConfig
from dijiang.compress.oneshot.hessian import LocalHessian
from dijiang.compress.oneshot.loss_allocation import POINTS, allocate_by_loss, curve
from dijiang.compress.oneshot.obs import sweep
from dijiang.compress.oneshot.plan import make_plan
from dijiang.compress.oneshot.run import PruningRun
from dijiang.compress.oneshot.sensitivity.measure import Sensitivities


def powers(scale, power):
    return [scale * s**power for s in POINTS]


def random_units(seed, count):
    rng = np.random.default_rng(seed)
    costs = [powers(np.exp(rng.normal(0, 2)), rng.uniform(1.5, 5)) for _ in range(count)]
    return costs, rng.integers(10, 5000, count).tolist()


def mean(shares, sizes):
    return sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("sparsity", "highest"), [(0.5, 0.7), (0.7, 0.9), (0.3, 0.3), (0.05, 0.95), (0.6, 0.61)])
def test_the_budget_is_exact_and_the_range_kept(seed, sparsity, highest):
    costs, sizes = random_units(seed, 1 + 7 * seed)
    shares = allocate_by_loss(costs, sizes, sparsity, highest)
    assert mean(shares, sizes) == pytest.approx(sparsity, abs=1e-12)
    assert all(-1e-12 <= share <= highest + 1e-12 for share in shares)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_on_a_grid_is_cheaper(seed):
    costs, sizes = random_units(seed, 3)
    shares = allocate_by_loss(costs, sizes, 0.5, 0.8)

    def cost(shares):
        return sum(curve(np.array(unit), np.array([share]))[0] for unit, share in zip(costs, shares, strict=True))

    best = cost(shares)
    grid = np.linspace(0, 0.8, 161)
    for first, second in itertools.product(grid, grid):
        third = (0.5 * sum(sizes) - first * sizes[0] - second * sizes[1]) / sizes[2]
        if 0 <= third <= 0.8:
            assert cost((first, second, third)) >= best * (1 - 1e-4)


def test_the_closed_form_of_powers():
    """With costs c s^3 and equal sizes, c s^2 is the same for all: s goes with c^(-1/2)."""
    costs = [powers(c, 3.0) for c in (1.0, 4.0, 9.0)]
    shares = allocate_by_loss(costs, [7, 7, 7], 0.3, 0.95)
    expected = np.array([1, 1 / 2, 1 / 3])
    assert shares == pytest.approx((0.9 * expected / expected.sum()).tolist(), abs=0.03)  # between points a curve is no power


def test_curves_pass_through_their_points_and_rise():
    costs = np.array(powers(2.0, 2.5))
    assert curve(costs, np.array(POINTS)) == pytest.approx(costs)
    assert curve(costs, np.array([0.0, 0.1])) == pytest.approx([0.0, 2.0 * 0.1**2.5])
    bumpy = costs.copy()
    bumpy[3] = bumpy[2] / 2  # noise of a measurement
    assert (np.diff(curve(bumpy, np.linspace(0, 0.95, 200))) >= 0).all()


def test_what_costs_more_keeps_more():
    sizes = [100] * 4
    shares = allocate_by_loss([powers(c, 2.5) for c in (1, 3, 3, 20)], sizes, 0.5, 0.9)
    assert shares[0] > shares[1] > shares[3] and shares[1] == pytest.approx(shares[2], abs=1e-9)
    scaled = allocate_by_loss([powers(1e6 * c, 2.5) for c in (1, 3, 3, 20)], sizes, 0.5, 0.9)
    assert scaled == pytest.approx(shares, abs=2e-3)
    # of two units with one cost, the bigger gives more
    small, big = allocate_by_loss([powers(1, 2.5)] * 2, [100, 400], 0.5, 0.95)
    assert big > small


def test_alike_units_share_alike_and_free_ones_go_first():
    assert allocate_by_loss([powers(1, 2)] * 5, [30] * 5, 0.4, 0.8) == pytest.approx([0.4] * 5)
    free, dear = allocate_by_loss([[0.0] * len(POINTS), powers(1, 2)], [10, 10], 0.4, 0.8)
    assert free == pytest.approx(0.8, abs=1e-9) and dear == pytest.approx(0.0, abs=1e-9)
    assert mean(allocate_by_loss([[0.0] * len(POINTS)] * 3, [1, 2, 3], 0.4, 0.8), [1, 2, 3]) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("costs", "sparsity", "highest", "message"),
    [
        ([powers(1, 2)], 0.5, 0.96, "up to 0.95"),
        ([powers(1, 2)], 0.5, 0.4, "up to 0.95, but 0.5 of the weights with at most 0.4"),
        ([[float("nan")] * len(POINTS)], 0.5, 0.7, "not finite"),
        ([[-1.0] * len(POINTS)], 0.5, 0.7, "negative"),
    ],
)
def test_what_makes_no_sense_is_refused(costs, sparsity, highest, message):
    with pytest.raises(ValueError, match=message):
        allocate_by_loss(costs, [10], sparsity, highest)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0.8, "alpha": 0.2}, "allow a matrix 1, but allocation by loss goes up to 0.95"),
        ({"sensitivity": "owl"}, "sensitivity owl has no effect"),
        ({"allocation": "best"}, "allocation 'best' is unknown; choose from rank, loss"),
    ],
)
def test_settings_that_contradict(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        PruneConfig(**{"calibration": (tmp_path / "x.txt",), "allocation": "loss"} | settings)
    assert PruneConfig(calibration=(tmp_path,), allocation="loss", sparsity=0.9).alpha == pytest.approx(0.05)


def test_layers_add_up():
    shapes = {"a": (4, 5), "b": (10, 2), "c": (5, 8)}
    costs = {"a": powers(1, 2), "b": powers(3, 2), "c": powers(4, 2)}
    found = Sensitivities(method="fisher", values=dict.fromkeys(shapes, 1.0), costs=costs)
    config = PruneConfig(calibration=("x",), allocation="loss", granularity="layer")
    plan = make_plan(shapes, {"a": 0, "b": 0, "c": 1}, found, config)
    assert plan.targets() == pytest.approx(dict.fromkeys(shapes, 0.5))  # two layers of one size and one cost


@pytest.mark.parametrize("settings", [{}, {"row_weights": "fisher", "comparison": "matrix"}])
def test_costs_of_a_model(make_source, text_file, tmp_path, settings):
    """A cost = the errors of a sweep of transformers' own matrix on its inputs, times its outputs' squared gradients."""
    source, model = make_source(num_key_value_heads=2)
    config = PruneConfig(
        calibration=(text_file,),
        samples=6,
        length=32,
        sensitivity_samples=4,
        allocation="loss",
        score="obs",
        seed=3,
        **settings,
    )
    run = PruningRun(source, tmp_path / "out", config, cache=tmp_path / "cache", progress=False)
    found = run.plan().sensitivity.costs
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    hessians, energy, handles = {}, {}, []
    for name in run.shapes:
        module = model.get_submodule(name)
        hessians[name], energy[name] = LocalHessian(module.in_features), torch.zeros(module.out_features)

        def hook(module, inputs, output, name=name):
            hessians[name].add(inputs[0].detach())

            def add(gradient):
                energy[name] += gradient.square().sum((0, 1))

            output.register_hook(add)

        handles.append(module.register_forward_hook(hook))
    for row in run.blocks[:4, None]:
        model(input_ids=row, labels=row).loss.backward()
    for name in run.shapes:
        weight, factor = model.get_submodule(name).weight.detach(), hessians[name].factor(name)
        how = {"comparison": "matrix", "row_weights": energy[name].sqrt()} if settings else {}
        for place in (0, 4, 7):
            change = sweep(weight, factor, sparsity=POINTS[place], score="obs", **how).weight - weight
            cost = torch.einsum("r,rc,cd,rd->", energy[name], change, hessians[name].matrix, change).item()
            assert found[name][place] == pytest.approx(cost, rel=2e-2), (name, place)
    targets = run.plan().targets()
    assert max(targets.values()) <= 0.7 + 1e-9 and len(set(targets.values())) > 3

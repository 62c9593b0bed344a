"""Traces of Hessian blocks against the whole Hessian of a toy net, and the two estimators against each other on a LLaMA."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

from dijiang.compress.oneshot.sensitivity import hessian_trace
from dijiang.compress.oneshot.sensitivity.hessian_trace import (
    central_difference,
    default_step,
    double_backward,
    draw_signs,
    trace_estimates,
)

hutchinson = partial(trace_estimates, double_backward)
finite_difference = partial(trace_estimates, central_difference)
ESTIMATORS = (hutchinson, finite_difference)
PROBES = 4000


class Toy:
    """A net of 78 weights with two tanh layers, cross-entropy on three batches, and the whole Hessian of each."""

    def __init__(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(143)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(3, 6, bias=False), torch.nn.Tanh(), torch.nn.Linear(6, 6, bias=False), torch.nn.Tanh(),
            torch.nn.Linear(6, 4, bias=False),
        ).to(dtype)  # fmt: skip
        with torch.no_grad():
            for weight in self.net.parameters():
                weight.copy_(0.7 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
        rows = [
            (torch.randn(5, 3, generator=generator, dtype=torch.float64), torch.randint(4, (5,), generator=generator))
            for _ in range(3)
        ]
        self.data = [(x.to(dtype), y) for x, y in rows]
        self.parameters = dict(self.net.named_parameters())
        self.losses = [lambda x=x, y=y: F.cross_entropy(self.net(x), y) for x, y in self.data]

    def hessian(self, i: int) -> dict[tuple[str, str], torch.Tensor]:
        """Blocks of the Hessian of batch i by two names, each (n_a, n_b)."""
        x, y = self.data[i]
        sizes = [p.numel() for p in self.parameters.values()]

        def loss(flat):
            pieces = [v.view_as(p) for v, p in zip(flat.split(sizes), self.parameters.values(), strict=True)]
            return F.cross_entropy(functional_call(self.net, dict(zip(self.parameters, pieces, strict=True)), x), y)

        flat = torch.cat([p.detach().flatten() for p in self.parameters.values()])
        whole = torch.autograd.functional.hessian(loss, flat)
        rows = zip(self.parameters, whole.split(sizes, 0), strict=True)
        return {(a, b): block for a, row in rows for b, block in zip(self.parameters, row.split(sizes, 1), strict=True)}

    def exact(self, hessian, k, *, groups, seed=0) -> dict[str, float]:
        """z_b^T (H z)_b of probe k by name, from the whole Hessian."""
        z = {n: draw_signs(p, seed, k, i).flatten() for i, (n, p) in enumerate(self.parameters.items())}
        return {a: sum(z[a] @ hessian[a, b] @ z[b] for b in group).item() for group in groups for a in group}


@pytest.fixture(scope="module")
def toy():
    return Toy()


def singly(parameters) -> list[list[str]]:
    return [[name] for name in parameters]


# --- against the whole Hessian ---


def test_toy_is_what_the_checks_need(toy):
    """Three matrices of 78 weights; one trace is negative, and noise from other blocks differs from a block's own."""
    assert [p.numel() for p in toy.parameters.values()] == [18, 36, 24]
    hessian = toy.hessian(0)
    assert min(hessian[name, name].trace() for name in toy.parameters) < -0.1
    for name in toy.parameters:
        own = hessian[name, name].square().sum()
        assert sum(hessian[name, b].square().sum() for b in toy.parameters if b != name) > 0.5 * 2 * own
        assert hessian[name, name].diagonal().square().sum() > 0.15 * own  # or its part in the variance could not be seen


@pytest.mark.parametrize("together", [True, False])
def test_mean_and_variance(toy, together):
    """Unbiased, also where the trace is negative; the variance is that of the block itself and, together, of its row."""
    hessian, names = toy.hessian(0), list(toy.parameters)
    groups = None if together else singly(names)
    estimates = hutchinson(toy.losses[:1], toy.parameters, probes=PROBES, seed=1, groups=groups)
    for name in names:
        block, values = hessian[name, name], np.array(estimates[name])
        own = block.square().sum() - block.diagonal().square().sum()
        cross = sum(hessian[name, b].square().sum() for b in names if b != name)
        variance = float(2 * own + (cross if together else 0))
        assert abs(values.mean() - block.trace().item()) < 4 * math.sqrt(variance / PROBES)
        assert values.var(ddof=1) == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize("grouping", ["together", "singly", "mixed"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_each_probe_is_exact(toy, estimator, grouping):
    """Probe k is z^T H z of batch k modulo 3, with z the same in every grouping."""
    a, b, c = toy.parameters
    groups = {"together": None, "singly": singly(toy.parameters), "mixed": [[c, a], [], [b]]}[grouping]
    progress = []
    settings = {"probes": 5, "seed": 4, "groups": groups, "advance": progress.append}
    estimates = estimator(toy.losses, toy.parameters, **settings)
    assert list(estimates) == [a, b, c] and progress == [1] * 5 * sum(map(bool, groups or [1]))
    hessians = [toy.hessian(i) for i in range(3)]
    tolerance = 1e-12 if estimator is hutchinson else 1e-6
    for k in range(5):
        expected = toy.exact(hessians[k % 3], k, groups=groups or [[a, b, c]], seed=4)
        assert {name: values[k] for name, values in estimates.items()} == pytest.approx(expected, rel=tolerance, abs=0)


def test_negative_traces_are_reported(toy):
    hessian = toy.hessian(0)
    name = min(toy.parameters, key=lambda n: hessian[n, n].trace())
    for estimator in ESTIMATORS:
        estimates = estimator(toy.losses[:1], toy.parameters, probes=300, seed=0, groups=singly(toy.parameters))
        assert np.mean(estimates[name]) < 0 and min(estimates[name]) < 2 * hessian[name, name].trace()


def test_step(toy, monkeypatch):
    """The default is eps^(1/3) of a typical weight; a coarse step shows its error, of second order."""
    weights = list(toy.parameters.values())
    flat = torch.cat([w.detach().flatten() for w in weights])
    assert default_step(weights) == pytest.approx(2 ** (-52 / 3) * flat.square().mean().sqrt().item())
    assert default_step([torch.zeros(2, 3)]) == pytest.approx(2 ** (-23 / 3))
    exact = toy.exact(toy.hessian(0), 0, groups=[list(toy.parameters)])
    errors = []
    for step in (2e-2, 1e-2):
        monkeypatch.setattr(hessian_trace, "default_step", lambda weights, step=step: step)
        estimates = finite_difference(toy.losses, toy.parameters, probes=1, seed=0)
        errors.append(max(abs(estimates[name][0] - value) for name, value in exact.items()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05) and errors[1] > 1e-5


# --- the draws ---


def test_seed_decides(toy):
    first, again, other = (hutchinson(toy.losses, toy.parameters, probes=3, seed=seed) for seed in (2, 2, 3))
    assert first == again and all(set(first[name]).isdisjoint(other[name]) for name in first)
    few = hutchinson(toy.losses, toy.parameters, probes=2, seed=2)
    assert few == {name: values[:2] for name, values in first.items()}
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    hutchinson(toy.losses, toy.parameters, probes=1, seed=2)
    assert torch.rand(1) == expected  # no other generator is touched


def test_draws_are_independent_and_of_unit_variance():
    weight = torch.zeros(40, 50)
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**40, 0, 0), (-1, 0, 0)]
    drawn = torch.stack([draw_signs(weight, *key).flatten() for key in keys])
    assert (drawn @ drawn.T / weight.numel() - torch.eye(len(keys))).abs().max() < 0.1
    assert drawn.mean(1).abs().max() < 0.1 and drawn.unique().tolist() == [-1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_draws_are_the_same_in_every_type(dtype):
    weight = torch.zeros(7, 5)
    z = draw_signs(weight.to(dtype), 3, 1, 2)
    assert z.dtype == dtype and torch.equal(z, draw_signs(weight, 3, 1, 2).to(dtype))


@pytest.mark.gpu
def test_draws_are_the_same_on_every_device():
    weight = torch.zeros(7, 5)
    assert torch.equal(draw_signs(weight.cuda(), 3, 1, 2).cpu(), draw_signs(weight, 3, 1, 2))


# --- what is left behind ---


@pytest.mark.parametrize("fail_at", [None, 1, 2])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_model_is_left_as_it_was(estimator, fail_at):
    """Weights bit for bit (added back, they would differ), requires_grad and .grad, also when the n-th loss fails."""
    toy = Toy(torch.float32)
    weights = list(toy.parameters.values())
    weights[1].requires_grad_(False)
    with torch.no_grad():
        weights[0][0, :2] = torch.tensor([-0.0, 1e-42])
    before = [w.detach().clone().view(torch.int32) for w in weights]
    calls = 0

    def loss():
        nonlocal calls
        calls += 1
        if estimator is finite_difference:
            assert not any(torch.equal(w.view(torch.int32), b) for w, b in zip(weights, before, strict=True))
        if calls == fail_at:
            raise RuntimeError("out of memory")
        return toy.losses[0]()

    def run():
        return estimator([loss], toy.parameters, probes=3, seed=0)

    if fail_at:
        with pytest.raises(RuntimeError, match="out of memory"):
            run()
        assert calls == fail_at
    else:
        assert all(all(values) for values in run().values())  # what was frozen has estimates too
    assert all(torch.equal(w.view(torch.int32), b) for w, b in zip(weights, before, strict=True))
    assert [w.requires_grad for w in weights] == [True, False, True] and all(w.grad is None for w in weights)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_only_the_current_group_requires_gradients(toy, estimator):
    seen = []

    def loss():
        seen.append([p.requires_grad for p in toy.parameters.values()])
        return toy.losses[0]()

    estimator([loss], toy.parameters, probes=1, seed=0, groups=singly(toy.parameters))
    times = 1 if estimator is hutchinson else 2
    assert seen == [[i == j for j in range(3)] for i in range(3) for _ in range(times)]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_grad_outside_does_not_matter(toy, estimator):
    settings = {"probes": 1, "seed": 0}
    with torch.no_grad():
        estimates = estimator(toy.losses, toy.parameters, **settings)
    assert estimates == estimator(toy.losses, toy.parameters, **settings)


# --- edges ---


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_unused_parameters_give_zeros(toy, estimator, grouped):
    parameters = {"unused": torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64)), **toy.parameters}
    settings = {"probes": 3, "seed": 0, "groups": singly(parameters) if grouped else None}
    estimates = estimator(toy.losses, parameters, **settings)
    assert estimates.pop("unused") == [0.0] * 3 and all(all(values) for values in estimates.values())


def test_linear_losses_have_no_curvature():
    weight, other = (torch.nn.Parameter(torch.full((2, 3), x, dtype=torch.float64)) for x in (1.0, 2.0))
    parameters = {"linear": weight, "square": other}
    estimates = hutchinson([lambda: weight.sum() + other.square().sum()], parameters, probes=2, seed=0)
    assert estimates == {"linear": [0.0, 0.0], "square": [12.0, 12.0]}
    assert hutchinson([weight.sum], {"linear": weight}, probes=1, seed=0) == {"linear": [0.0]}


def test_refusals(toy):
    def check(message, losses=toy.losses, parameters=toy.parameters, **settings):
        with pytest.raises(ValueError, match=message) as caught:
            hutchinson(losses, parameters, **{"probes": 1, "seed": 0} | settings)
        assert "\n" not in str(caught.value)

    a, b, c = toy.parameters
    check("^0 probes of 3 losses", probes=0)
    check("^1 probes of 0 losses", losses=[])
    check("^a parameter has two names", parameters={"x": toy.parameters[a], "y": toy.parameters[a]})
    for groups in ([[a, b]], [[a, b], [b, c]], [[a, b, c, "d"]], []):
        check("^the groups must hold the name of every parameter once", groups=groups)


# --- a LLaMA ---


@pytest.fixture(scope="module")
def llama():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, attn_implementation="eager")
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (0.4 if weight.dim() == 2 else 0.1))
    ids = torch.randint(32, (3, 1, 12), generator=generator)
    return model, [lambda row=row: model(input_ids=row, labels=row, use_cache=False).loss for row in ids]


@pytest.mark.parametrize("grouped", [False, True])
def test_estimators_agree_on_a_llama(llama, grouped):
    model, losses = llama
    parameters = {n: p for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2}
    assert len(parameters) == 14
    groups = [[n for n in parameters if f".layers.{i}." in n] for i in range(2)] if grouped else None
    double, single = (e(losses, parameters, probes=4, seed=0, groups=groups) for e in ESTIMATORS)
    for name in parameters:
        assert single[name] == pytest.approx(double[name], rel=0, abs=1e-3 * np.abs(double[name]).max()), name
    other = finite_difference(losses, parameters, probes=4, seed=1, groups=groups)
    assert not np.allclose([*map(np.mean, other.values())], [*map(np.mean, double.values())], rtol=2e-1)

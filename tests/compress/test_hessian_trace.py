"""Traces of Hessian blocks against the whole Hessian of a toy net, and the two estimators against each other on a LLaMA."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

from dijiang.compress.oneshot.sensitivity.hessian_trace import (
    DISTRIBUTIONS,
    default_step,
    draw,
    finite_difference,
    hutchinson,
    split_half_correlation,
    to_sensitivity,
)

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

    def exact(self, hessian, k, *, groups, distribution="rademacher", seed=0) -> dict[str, float]:
        """z_b^T (H z)_b of probe k by name, from the whole Hessian."""
        z = {n: draw(p, distribution, seed, k, i).flatten() for i, (n, p) in enumerate(self.parameters.items())}
        return {a: sum(z[a] @ hessian[a, b] @ z[b] for b in group).item() for group in groups for a in group}


@pytest.fixture(scope="module")
def toy():
    return Toy()


def singly(parameters) -> list[list[str]]:
    return [[name] for name in parameters]


# --- against the whole Hessian ---


def test_toy_is_what_the_checks_need(toy):
    """Three matrices of 78 weights; one trace is negative, and noise from other blocks can be told from a block's own."""
    assert [p.numel() for p in toy.parameters.values()] == [18, 36, 24]
    hessian = toy.hessian(0)
    assert min(hessian[name, name].trace() for name in toy.parameters) < -0.1
    for name in toy.parameters:
        own = hessian[name, name].square().sum()
        assert sum(hessian[name, b].square().sum() for b in toy.parameters if b != name) > 0.5 * 2 * own
        assert hessian[name, name].diagonal().square().sum() > 0.15 * own  # or the two distributions were as good


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_mean_and_variance(toy, distribution, together):
    """Unbiased, also where the trace is negative; the variance is that of the block itself and, together, of its row."""
    hessian, names = toy.hessian(0), list(toy.parameters)
    found = hutchinson(
        toy.losses[:1], toy.parameters, probes=PROBES, seed=1, distribution=distribution,
        groups=None if together else singly(names),
    )  # fmt: skip
    for name in names:
        block, values = hessian[name, name], np.array(found[name])
        own = block.square().sum() - (block.diagonal().square().sum() if distribution == "rademacher" else 0)
        cross = sum(hessian[name, b].square().sum() for b in names if b != name)
        variance = float(2 * own + (cross if together else 0))
        assert abs(values.mean() - block.trace().item()) < 4 * math.sqrt(variance / PROBES)
        assert values.var(ddof=1) == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize("grouping", ["together", "singly", "mixed"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_each_probe_is_exact(toy, estimator, distribution, grouping):
    """Probe k is z^T H z of batch k modulo 3, with z the same in every grouping."""
    a, b, c = toy.parameters
    groups = {"together": None, "singly": singly(toy.parameters), "mixed": [[c, a], [], [b]]}[grouping]
    told = []
    settings = {"probes": 5, "seed": 4, "distribution": distribution, "groups": groups, "advance": told.append}
    found = estimator(toy.losses, toy.parameters, **settings)
    assert list(found) == [a, b, c] and told == [1] * 5 * sum(map(bool, groups or [1]))
    hessians = [toy.hessian(i) for i in range(3)]
    tolerance = 1e-12 if estimator is hutchinson else 1e-6
    for k in range(5):
        expected = toy.exact(hessians[k % 3], k, groups=groups or [[a, b, c]], distribution=distribution, seed=4)
        assert {name: values[k] for name, values in found.items()} == pytest.approx(expected, rel=tolerance, abs=0)


def test_negative_traces_are_reported(toy):
    hessian = toy.hessian(0)
    name = min(toy.parameters, key=lambda n: hessian[n, n].trace())
    for estimator in ESTIMATORS:
        found = estimator(toy.losses[:1], toy.parameters, probes=300, seed=0, groups=singly(toy.parameters))
        assert np.mean(found[name]) < 0 and min(found[name]) < 2 * hessian[name, name].trace()


def test_step(toy):
    """The default is eps^(1/3) of a typical weight; a coarse step shows its error, of second order."""
    weights = list(toy.parameters.values())
    flat = torch.cat([w.detach().flatten() for w in weights])
    assert default_step(weights) == pytest.approx(2 ** (-52 / 3) * flat.square().mean().sqrt().item())
    assert default_step([torch.zeros(2, 3)]) == pytest.approx(2 ** (-23 / 3))
    exact = toy.exact(toy.hessian(0), 0, groups=[list(toy.parameters)])
    errors = []
    for step in (2e-2, 1e-2):
        found = finite_difference(toy.losses, toy.parameters, probes=1, seed=0, step=step)
        errors.append(max(abs(found[name][0] - value) for name, value in exact.items()))
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
    for distribution in DISTRIBUTIONS:
        keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**40, 0, 0), (-1, 0, 0)]
        drawn = torch.stack([draw(weight, distribution, *key).flatten() for key in keys])
        assert (drawn @ drawn.T / weight.numel() - torch.eye(len(keys))).abs().max() < 0.1
        assert drawn.mean(1).abs().max() < 0.1
    assert draw(weight, "rademacher", 0).unique().tolist() == [-1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_draws_are_the_same_in_every_type(dtype):
    weight = torch.zeros(7, 5)
    for distribution in DISTRIBUTIONS:
        z = draw(weight.to(dtype), distribution, 3, 1, 2)
        assert z.dtype == dtype and torch.equal(z, draw(weight, distribution, 3, 1, 2).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_draws_are_the_same_on_every_device(distribution):
    weight = torch.zeros(7, 5)
    assert torch.equal(draw(weight.cuda(), distribution, 3, 1, 2).cpu(), draw(weight, distribution, 3, 1, 2))


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
def test_only_the_group_at_work_asks_for_gradients(toy, estimator):
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
        found = estimator(toy.losses, toy.parameters, **settings)
    assert found == estimator(toy.losses, toy.parameters, **settings)


# --- edges ---


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_unused_parameters_give_zeros(toy, estimator, grouped):
    parameters = {"unused": torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64)), **toy.parameters}
    settings = {"probes": 3, "seed": 0, "groups": singly(parameters) if grouped else None}
    found = estimator(toy.losses, parameters, **settings)
    assert found.pop("unused") == [0.0] * 3 and all(all(values) for values in found.values())


def test_linear_losses_have_no_curvature():
    weight, other = (torch.nn.Parameter(torch.full((2, 3), x, dtype=torch.float64)) for x in (1.0, 2.0))
    parameters = {"linear": weight, "square": other}
    found = hutchinson([lambda: weight.sum() + other.square().sum()], parameters, probes=2, seed=0)
    assert found == {"linear": [0.0, 0.0], "square": [12.0, 12.0]}
    assert hutchinson([weight.sum], {"linear": weight}, probes=1, seed=0) == {"linear": [0.0]}


def test_refusals(toy):
    def check(message, estimator=hutchinson, losses=toy.losses, parameters=toy.parameters, **settings):
        with pytest.raises(ValueError, match=message) as caught:
            estimator(losses, parameters, **{"probes": 1, "seed": 0} | settings)
        assert "\n" not in str(caught.value)

    a, b, c = toy.parameters
    check("^0 probes of 3 losses", probes=0)
    check("^1 probes of 0 losses", losses=[])
    check("^distribution 'cauchy' is unknown; choose from rademacher, gaussian", distribution="cauchy")
    check("^a parameter has two names", parameters={"x": toy.parameters[a], "y": toy.parameters[a]})
    for groups in ([[a, b]], [[a, b], [b, c]], [[a, b, c, "d"]], []):
        check("^the groups must hold the name of every parameter once", groups=groups)
    for step in (0.0, -1e-3, math.nan):
        check("must be positive", finite_difference, step=step)
    coarse = {"q_proj": torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))}
    check("^q_proj is in torch.bfloat16, too coarse", finite_difference, parameters=coarse)


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


# --- from estimates to a ranking ---


@pytest.mark.parametrize("probes", [2, 3, 16])
def test_split_half_correlation_is_scipys(probes):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        table = rng.normal(size=(11, probes)) + rng.normal(size=(11, 1))
        found = split_half_correlation({str(i): row.tolist() for i, row in enumerate(table)})
        expected = spearmanr(table[:, 0::2].mean(1), table[:, 1::2].mean(1)).statistic
        assert found == pytest.approx(expected, rel=1e-12) and isinstance(found, float)


def test_split_halves_are_interleaved():
    """What drifts from the first probes to the last, such as the text, does not come between the halves."""
    drifting = {str(i): [i, i, -2 * i, -2 * i] for i in range(5)}
    assert split_half_correlation(drifting) == pytest.approx(1.0)
    assert split_half_correlation({name: [a, c, b, d] for name, (a, b, c, d) in drifting.items()}) == pytest.approx(-1.0)


@pytest.mark.parametrize(
    "estimates",
    [
        {},
        {"a": [1.0], "b": [2.0], "c": [3.0]},
        {"a": [1.0, 2.0], "b": [2.0, 1.0]},
        {"a": [1.0, 2.0], "b": [1.0, 3.0], "c": [1.0, 4.0]},
        {"a": [1.0, 2.0], "b": [2.0, math.nan], "c": [3.0, 1.0]},
        {"a": [1.0, 2.0], "b": [2.0, math.inf], "c": [3.0, 1.0]},
    ],
)
def test_no_correlation_where_there_is_none(estimates):
    assert split_half_correlation(estimates) is None


def test_sensitivity_by_hand():
    estimates = {"a": [-1.0, 4.0], "b": [-3.0, 1.0], "c": [0.0, 0.0]}  # clamped first, b would be 0.5
    sizes = {"a": 3, "b": 4, "c": 5}
    assert to_sensitivity(estimates, sizes) == ({"a": 1.5, "b": 0.0, "c": 0.0}, ["b"])
    assert to_sensitivity(estimates, sizes, "mean") == ({"a": 0.5, "b": 0.0, "c": 0.0}, ["b"])


def test_sensitivity_refusals():
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=r"^the sensitivity of q_proj is NaN or infinite"):
            to_sensitivity({"v_proj": [1.0, 2.0], "q_proj": [1.0, bad]}, {"v_proj": 1, "q_proj": 1})
    with pytest.raises(ValueError, match=r"^normalisation 'median' is unknown; choose from total, mean"):
        to_sensitivity({"a": [1.0]}, {"a": 1}, "median")

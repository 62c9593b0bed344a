"""Linear attention in C against its definition and its torch form."""

from itertools import pairwise

import pytest
import torch

from dijiang.modeling import native_build
from dijiang.modeling.exponential_maps import ExponentialMap, Exponents
from dijiang.modeling.linear_attention import TINY, weighted_sums
from dijiang.modeling.linear_attention_native import NativeMaps, native_linear_attention, native_supports, plan_tasks

needs_compiler = pytest.mark.skipif(native_build.find_compiler() is None, reason="no C compiler")
NAMES = ("numerator", "state", "sums")


@pytest.fixture(autouse=True)
def native(monkeypatch):
    monkeypatch.delenv("DIJIANG_NATIVE", raising=False)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs(
    *shape, sizes=(64, 32, 32), seed=0, activation="softmax", dtype=torch.float32, weighted=False, decay=False, sums=True
):
    """Arguments of native_linear_attention, `shape` being B, T, G, R and `sizes` M, d, e; q, k, v are slices of one tensor."""
    generator = torch.Generator().manual_seed(seed)
    B, T, G, R = (*shape, *(1, 130, 2, 1)[len(shape) :])
    M, d, e = sizes
    H = G * R

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    q, k, v = random(B, T, H * d + G * d + G * e).to(dtype).split((H * d, G * d, G * e), dim=-1)
    map_q, map_k = (Exponents(random(heads, M, d) * d**-0.5, 0.3 * random(heads, M)) for heads in (H, G))
    return {
        "q": q.view(B, T, H, d),
        "k": k.view(B, T, G, d),
        "v": v.view(B, T, G, e),
        "maps": NativeMaps(map_q, map_k, activation),
        "key_weight": random(B, T, G).clamp_min(0) if weighted else None,
        "log_decay": -random(G).abs() / 4 if decay else None,
        "state": random(B, G, M, e + sums).abs(),
        "sums": sums,
    }


def oracle(q, k, v, maps, *, key_weight, log_decay, state, sums):
    """The definition, one token after another in float64."""
    v, state = v.double(), state.double()

    def features(x, exponents):
        z = torch.einsum("bthd,hmd->bthm", x.double(), exponents.W.double()) + exponents.b.double()
        return z.softmax(-1) if maps.activation == "softmax" else z.clamp(-20, 20).exp() / z.shape[-1] ** 0.5

    phi_q, phi_k = features(q, maps.q), features(k, maps.k)
    if key_weight is not None:
        phi_k = phi_k * key_weight[..., None]
    v = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1) if sums else v
    rows = []
    for t in range(q.shape[1]):
        if log_decay is not None:
            state = state * log_decay.double().exp().view(-1, 1, 1)
        state = state + phi_k[:, t, :, :, None] * v[:, t, :, None, :]
        seen = state.repeat_interleave(q.shape[2] // k.shape[2], dim=1)
        rows.append(torch.einsum("bhm,bhme->bhe", phi_q[:, t], seen))
    o = torch.stack(rows, dim=1)
    return (o[..., :-1], o[..., -1], state) if sums else (o, None, state)


class FixedMap(ExponentialMap):
    """The torch form of one side's map, of any W and b."""

    def __init__(self, fixed, activation):
        torch.nn.Module.__init__(self)
        self.fixed, self.activation = fixed, activation

    def exponents(self, x, scale=1.0):
        return self.project(x, *self.fixed)


def torch_form(q, k, v, maps, *, key_weight, log_decay, state, sums):
    phi_q, phi_k = (FixedMap(side, maps.activation)(x).float() for side, x in ((maps.q, q), (maps.k, k)))
    phi_k = phi_k if key_weight is None else phi_k * key_weight[..., None]
    return weighted_sums(phi_q, phi_k, v.float(), log_decay=log_decay, sums=sums, state=state)


def assert_close(results, expected, tolerance=2e-6):
    for name, x, y in zip(NAMES, results, expected, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            error = ((x.double() - y.double()).norm() / y.double().norm()).item()
            assert x.shape == y.shape and error < tolerance, f"{name}: {error:.1e}"


def compare(arguments, expected, tolerance=2e-6):
    before = arguments["state"].clone()
    assert_close(native_linear_attention(**arguments), expected(**arguments), tolerance)
    assert torch.equal(arguments["state"], before)


@needs_compiler
@pytest.mark.parametrize("activation", ["softmax", "exp"])
@pytest.mark.parametrize("T", [1, 5, 63, 64, 65, 130, 200])
def test_equals_the_definition_at_every_length(T, activation):
    for seed, (B, R) in enumerate([(1, 1), (2, 3), (3, 1)]):
        options = {"weighted": seed > 0, "decay": seed % 2 == 0}
        compare(inputs(B, T, 2, R, seed=seed, activation=activation, **options), oracle)


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"weighted": True}, {"decay": True}, {"weighted": True, "decay": True}])
@pytest.mark.parametrize("sizes", [(16, 16, 48), (48, 64, 16), (64, 32, 80), (128, 48, 64), (80, 16, 144)], ids=str)
@pytest.mark.parametrize("sums", [True, False])
def test_equals_the_definition_at_every_size(sizes, options, sums):
    for seed, activation in enumerate(["softmax", "exp"]):
        compare(inputs(2, 75, 2, 1 + 2 * seed, sizes=sizes, seed=seed, activation=activation, sums=sums, **options), oracle)


@needs_compiler
@pytest.mark.parametrize("activation", ["softmax", "exp"])
def test_equals_the_torch_form(activation):
    for seed in range(3):
        options = {"weighted": True, "decay": seed > 0}
        compare(inputs(2, 700, 3, 1 + seed, seed=seed, activation=activation, **options), torch_form, 5e-6)


@needs_compiler
@pytest.mark.parametrize("activation", ["softmax", "exp"])
def test_bfloat16(activation):
    arguments = inputs(
        2, 200, 2, 3, sizes=(64, 64, 48), activation=activation, dtype=torch.bfloat16, weighted=True, decay=True
    )
    compare(arguments, oracle)  # the inputs are exact, and so is what follows
    compare(arguments, torch_form, 1e-2)
    o, total, _ = native_linear_attention(**arguments, normalize=True)
    numerator, sums, _ = oracle(**arguments)
    assert o.dtype == torch.bfloat16 and total is None
    torch.testing.assert_close(o.double(), numerator / sums[..., None], rtol=2**-8, atol=1e-6)


@needs_compiler
def test_normalize_divides():
    arguments = inputs(2, 100, weighted=True)
    arguments["key_weight"][:, :7] = 0
    arguments["state"].zero_()
    o, total, state = native_linear_attention(**arguments, normalize=True)
    numerator, sums, expected_state = native_linear_attention(**arguments)
    assert total is None
    torch.testing.assert_close(o, numerator / sums.clamp_min(TINY).unsqueeze(-1))
    assert not o[:, :7].any() and torch.equal(state, expected_state)


@needs_compiler
@pytest.mark.parametrize("activation", ["softmax", "exp"])
def test_large_exponents_stay_finite(activation):
    arguments = inputs(1, 300, activation=activation)
    map_q, map_k = (side._replace(W=300 * side.W) for side in arguments["maps"][:2])
    arguments["maps"] = NativeMaps(map_q, map_k, activation)
    compare(arguments, oracle, 1e-3)  # of exponents near 1000, rounding is all the error there is
    assert all(x.isfinite().all() for x in native_linear_attention(**arguments))


@needs_compiler
def test_no_query_sees_a_later_token():
    arguments = inputs(1, 130, decay=True)
    before = native_linear_attention(**arguments)[0]
    for t in (1, 17, 63, 64, 100):
        changed = arguments | {name: arguments[name].clone() for name in "kv"}
        changed["k"][:, t:] += 1
        changed["v"][:, t:] -= 1
        after = native_linear_attention(**changed)[0]
        assert torch.equal(before[:, :t], after[:, :t]) and not torch.equal(before[:, t], after[:, t])


@needs_compiler
def test_a_nan_stays_visible():
    arguments = inputs(1, 80)
    arguments["q"][0, 3, 0, 0] = float("nan")
    o = native_linear_attention(**arguments)[0]
    assert o[0, 3, 0].isnan().all() and o[0, 4:].isfinite().all()


@needs_compiler
@pytest.mark.parametrize(("B", "G", "R"), [(1, 3, 1), (1, 1, 3), (3, 3, 1)])
def test_threads_do_not_change_the_numbers(threads, B, G, R):
    arguments = inputs(B, 1300, G, R, weighted=True, decay=True)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(native_linear_attention(**arguments))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("pairs", [1, 2, 3, 9, 10, 33])
def test_tasks_cover_every_token_of_every_pair_once(pairs, threads):
    for T in (1, 64, 1000, 8192, 100_001):
        tasks = plan_tasks(T, threads, pairs, 0.4)
        covered = sorted((pair, start, end) for first, last, start, end in tasks for pair in range(first, last))
        for pair in range(pairs):
            cuts = [(start, end) for p, start, end in covered if p == pair]
            assert cuts[0][0] == 0 and cuts[-1][1] == T and all(start < end for start, end in cuts)
            assert all(x[1] == y[0] and y[0] % 64 == 0 for x, y in pairwise(cuts))


@needs_compiler
def test_refusals():
    arguments = inputs()
    q, k, v, maps = (arguments[name] for name in ("q", "k", "v", "maps"))
    assert native_supports(q, k, v, 64)
    assert not native_supports(q, k, v, 40)
    assert not native_supports(q.bfloat16(), k, v, 64)
    assert not native_supports(*(x.transpose(2, 3) for x in (q, k, v)), 64)
    assert not native_supports(q, k, v[..., :24], 64)
    for change, message in (
        ({"v": v[..., :24]}, "the native kernel cannot take q"),
        ({"maps": maps._replace(activation="relu")}, "activation='relu' is unknown"),
        ({"maps": maps._replace(q=maps.q._replace(b=maps.q.b[:, :-1]))}, "b_q is"),
        ({"sums": False}, "state is"),
        ({"sums": False, "normalize": True}, "no sums to divide by"),
        ({"state": arguments["state"][..., :-1]}, "state is"),
        ({"log_decay": torch.zeros(5)}, "log_decay is"),
    ):
        with pytest.raises(ValueError, match=message):
            native_linear_attention(**arguments | change)


def test_is_not_run_where_native_code_is_off(monkeypatch):
    monkeypatch.setenv("DIJIANG_NATIVE", "0")
    with pytest.raises(RuntimeError, match="DIJIANG_NATIVE=0"):
        native_linear_attention(**inputs())

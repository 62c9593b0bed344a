import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from dijiang.modeling import native_build
from dijiang.modeling.decode_step_native import SOURCE
from dijiang.modeling.exponential_maps import ExponentialMap
from dijiang.modeling.linear_attention import TINY, weighted_sums
from dijiang.modeling.linear_attention_native import (
    native_is_usable,
    native_linear_attention,
    native_supports,
    plan_tasks,
)

needs_compiler = pytest.mark.skipif(native_build.find_compiler() is None, reason="no C compiler")
NAMES = ("numerator", "state", "sums")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("DIJIANG_NATIVE", raising=False)
    yield
    native_build.find_or_build.cache_clear()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs(B=1, T=130, G=2, R=1, M=64, d=32, e=32, *, seed=0, dtype=torch.float32, weighted=False, decay=False, sums=True):
    """Arguments of native_linear_attention but for the activation; q, k and v are slices of one projection."""
    generator = torch.Generator().manual_seed(seed)
    H = G * R

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    q, k, v = random(B, T, H * d + G * d + G * e).to(dtype).split((H * d, G * d, G * e), dim=-1)
    found = {"q": q.view(B, T, H, d), "k": k.view(B, T, G, d), "v": v.view(B, T, G, e)}
    for name, heads in (("q", H), ("k", G)):
        found |= {f"W_{name}": random(heads, M, d) * d**-0.5, f"b_{name}": 0.3 * random(heads, M)}
    found["key_weight"] = random(B, T, G).clamp_min(0) if weighted else None
    found["log_decay"] = -random(G).abs() / 4 if decay else None
    return found | {"state": random(B, G, M, e + sums).abs(), "sums": sums}


def oracle(q, k, v, W_q, b_q, W_k, b_k, *, activation, key_weight, log_decay, state, sums):
    """The definition, one token after another in float64."""
    q, k, v, state = q.double(), k.double(), v.double(), state.double()

    def features(x, W, b):
        z = torch.einsum("bthd,hmd->bthm", x, W.double()) + b.double()
        return z.softmax(-1) if activation == "softmax" else z.clamp(-20, 20).exp() / z.shape[-1] ** 0.5

    phi_q, phi_k = features(q, W_q, b_q), features(k, W_k, b_k)
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


class GivenMap(ExponentialMap):
    """The torch form of one side's map, of any W and b."""

    def __init__(self, W, b, activation):
        torch.nn.Module.__init__(self)
        self.W, self.b, self.activation = W, b, activation

    def exponents(self, x, scale=1.0):
        return self.project(x, self.W, self.b)


def torch_form(q, k, v, W_q, b_q, W_k, b_k, *, activation, key_weight, log_decay, state, sums):
    phi_q, phi_k = GivenMap(W_q, b_q, activation)(q).float(), GivenMap(W_k, b_k, activation)(k).float()
    phi_k = phi_k if key_weight is None else phi_k * key_weight[..., None]
    return weighted_sums(phi_q, phi_k, v.float(), log_decay=log_decay, sums=sums, state=state)


def assert_close(found, expected, tolerance=2e-6):
    for name, x, y in zip(NAMES, found, expected, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            error = ((x.double() - y.double()).norm() / y.double().norm()).item()
            assert x.shape == y.shape and error < tolerance, f"{name}: {error:.1e}"


def compare(arguments, activation, expected, tolerance=2e-6):
    kept = arguments["state"].clone()
    found = native_linear_attention(**arguments, activation=activation)
    assert_close(found, expected(**arguments, activation=activation), tolerance)
    assert torch.equal(arguments["state"], kept)


@needs_compiler
@pytest.mark.parametrize("activation", ["softmax", "exp"])
@pytest.mark.parametrize("T", [1, 5, 63, 64, 65, 130, 200])
def test_equals_the_definition_at_every_length(T, activation):
    for seed, (B, R) in enumerate([(1, 1), (2, 3), (3, 1)]):
        given = inputs(B, T, 2, R, seed=seed, weighted=seed > 0, decay=seed % 2 == 0)
        compare(given, activation, oracle)


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"weighted": True}, {"decay": True}, {"weighted": True, "decay": True}])
@pytest.mark.parametrize("M,d,e", [(16, 16, 48), (48, 64, 16), (64, 32, 80), (128, 48, 64), (80, 16, 144)])
@pytest.mark.parametrize("sums", [True, False])
def test_equals_the_definition_at_every_size(M, d, e, options, sums):
    for seed, activation in enumerate(["softmax", "exp"]):
        compare(inputs(2, 75, 2, 1 + 2 * seed, M, d, e, seed=seed, sums=sums, **options), activation, oracle)


@needs_compiler
@pytest.mark.parametrize("activation", ["softmax", "exp"])
def test_equals_the_torch_form(activation):
    for seed in range(3):
        compare(inputs(2, 700, 3, 1 + seed, seed=seed, weighted=True, decay=seed > 0), activation, torch_form, 5e-6)


@needs_compiler
@pytest.mark.parametrize("activation", ["softmax", "exp"])
def test_bfloat16(activation):
    given = inputs(2, 200, 2, 3, 64, 64, 48, dtype=torch.bfloat16, weighted=True, decay=True)
    compare(given, activation, oracle)  # the inputs are exact, and so is what follows
    compare(given, activation, torch_form, 1e-2)
    o, total, _ = native_linear_attention(**given, activation=activation, normalize=True)
    numerator, sums, _ = oracle(**given, activation=activation)
    assert o.dtype == torch.bfloat16 and total is None
    torch.testing.assert_close(o.double(), numerator / sums[..., None], rtol=2**-8, atol=1e-6)


@needs_compiler
def test_normalize_divides():
    given = inputs(2, 100, weighted=True)
    given["key_weight"][:, :7] = 0
    given["state"].zero_()
    o, total, state = native_linear_attention(**given, activation="softmax", normalize=True)
    numerator, sums, expected_state = native_linear_attention(**given, activation="softmax")
    assert total is None
    torch.testing.assert_close(o, numerator / sums.clamp_min(TINY).unsqueeze(-1))
    assert not o[:, :7].any() and torch.equal(state, expected_state)


@needs_compiler
@pytest.mark.parametrize("activation", ["softmax", "exp"])
def test_large_exponents_stay_finite(activation):
    given = inputs(1, 300, dtype=torch.float32)
    given["W_q"], given["W_k"] = 300 * given["W_q"], 300 * given["W_k"]
    compare(given, activation, oracle, 1e-3)  # of exponents near 1000, rounding is all the error there is
    assert all(x.isfinite().all() for x in native_linear_attention(**given, activation=activation))


@needs_compiler
def test_no_query_sees_a_later_token():
    given = inputs(1, 130, decay=True)
    before = native_linear_attention(**given, activation="softmax")[0]
    for t in (1, 17, 63, 64, 100):
        changed = given | {name: given[name].clone() for name in "kv"}
        changed["k"][:, t:] += 1
        changed["v"][:, t:] -= 1
        after = native_linear_attention(**changed, activation="softmax")[0]
        assert torch.equal(before[:, :t], after[:, :t]) and not torch.equal(before[:, t], after[:, t])


@needs_compiler
def test_a_nan_stays_visible():
    given = inputs(1, 80)
    given["q"][0, 3, 0, 0] = float("nan")
    o = native_linear_attention(**given, activation="softmax")[0]
    assert o[0, 3, 0].isnan().all() and o[0, 4:].isfinite().all()


@needs_compiler
@pytest.mark.parametrize("B,G,R", [(1, 3, 1), (1, 1, 3), (3, 3, 1)])
def test_threads_do_not_change_the_numbers(threads, B, G, R):
    given = inputs(B, 1300, G, R, weighted=True, decay=True)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(native_linear_attention(**given, activation="softmax"))
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
    given = inputs()
    assert native_supports(given["q"], given["k"], given["v"], 64)
    assert not native_supports(given["q"], given["k"], given["v"], 40)
    assert not native_supports(given["q"].bfloat16(), given["k"], given["v"], 64)
    assert not native_supports(*(given[name].transpose(2, 3) for name in "qkv"), 64)
    assert not native_supports(given["q"], given["k"], given["v"][..., :24], 64)
    bad = [{"v": given["v"][..., :24]}, {"activation": "relu"}, {"b_q": given["b_q"][:, :-1]}, {"sums": False}]
    for change in [*bad, {"state": given["state"][..., :-1]}, {"log_decay": torch.zeros(5)}]:
        with pytest.raises(ValueError):
            native_linear_attention(**{"activation": "softmax"} | given | change)


def test_off_by_environment(monkeypatch):
    monkeypatch.setenv("DIJIANG_NATIVE", "0")
    usable, reason = native_is_usable()
    assert not usable and "DIJIANG_NATIVE=0" in reason
    with pytest.raises(RuntimeError, match="DIJIANG_NATIVE=0"):
        native_linear_attention(**inputs(), activation="softmax")


def test_without_a_compiler(monkeypatch, tmp_path):
    native_build.find_or_build.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    usable, reason = native_is_usable()
    assert not usable and "no C compiler" in reason and "\n" not in reason


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    native_build.find_or_build.cache_clear()
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'error: out of order' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    usable, reason = native_is_usable()
    assert not usable and "out of order" in reason and "\n" not in reason
    assert not list((tmp_path / "dijiang").iterdir())


@needs_compiler
def test_a_cache_that_is_not_writable(monkeypatch, tmp_path):
    native_build.find_or_build.cache_clear()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(native_build.tempfile, "tempdir", str(tmp_path))
    assert native_is_usable() == (True, "")


@needs_compiler
def test_two_processes_may_compile_at_once(tmp_path):
    code = (
        "from dijiang.modeling.linear_attention_native import native_is_usable\n"
        "assert native_is_usable() == (True, ''), native_is_usable()\n"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=tmp_path) for _ in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert [path.suffix for path in (tmp_path / "dijiang").iterdir()] == [".so"]


@needs_compiler
def test_a_library_is_built_once_per_source_and_processor(monkeypatch, tmp_path):
    compiler, source = native_build.find_compiler(), "int answer(void) { return 42; }"
    for flags in (native_build.FLAGS, native_build.FLAGS + native_build.REORDERED_SUMS):
        assert native_build.build(source, compiler, flags, tmp_path).answer() == 42
    made = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    native_build.build(source, compiler, native_build.FLAGS, tmp_path)
    assert len(made) == 2 and made == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    monkeypatch.setattr(native_build, "describe_processor", lambda: "another")
    native_build.build(source, compiler, native_build.FLAGS, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@needs_compiler
def test_native_code_leaves_the_rounding_of_tiny_numbers_alone():
    assert native_is_usable()[0] and native_build.load_library(SOURCE, reordered_sums=True)[0]
    tiny = torch.tensor([1e-39])  # a subnormal number, which -ffast-math would flush to zero in the whole process
    assert (tiny * 1.0).item() > 0

"""The decoding step in C against the same step in torch, and what happens where it cannot be compiled."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import DECAYS, WINDOWS, assert_close, tiny_model

from dijiang.modeling import native_build, native_step

MAPS_IN_C = ("wdcf", "wpff", "pff", "prf", "hedgehog")


def settled_layer(dtype=torch.float32, B=2, seed=0, **settings):
    """A layer in eval mode, the state after some tokens, and q, k, v of the next one as `project` gives them: views."""
    layer = tiny_model(seed, **settings).model.layers[0].self_attn
    generator = torch.Generator().manual_seed(seed)
    qk = torch.randn(B, 31, 8, 8, generator=generator).to(dtype)
    q, k = qk.split((6, 2), dim=2)
    v = torch.randn(B, 31, 2, 8, generator=generator).to(dtype)
    with torch.no_grad():
        _, state = layer.attend(q[:, :-1], k[:, :-1], v[:, :-1])
    assert state.settled
    return layer, (q[:, -1:], k[:, -1:], v[:, -1:]), state.compact()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("name", MAPS_IN_C)
@torch.no_grad()
def test_step_in_c_equals_the_step_in_torch(name, decay, window, dtype, monkeypatch):
    settings = {"feature_map": name, "decay": decay, "attention_window": window[0], "attention_sinks": window[1]}
    for seed, more in enumerate(({}, {"feature_pairs": False, "key_scale": False, "scale_features": False})):
        layer, token, state = settled_layer(dtype, B=2 + seed, seed=seed, **settings, **more)
        before = [x.clone() for x in state.tensors()]
        found, new = native_step.native_step(layer, *token, state)
        assert all(torch.equal(x, y) for x, y in zip(before, state.tensors(), strict=True))
        with monkeypatch.context() as patch:
            patch.setattr(native_step, "step_function", lambda: None)
            expected, expected_new = layer.attend_step(*token, state)
        assert_close(found, expected, "o", tolerance=1e-5)
        for name_, x in vars(expected_new).items():
            y = getattr(new, name_)
            if isinstance(x, torch.Tensor) and x.numel():
                assert_close(y.float(), x.float(), name_, tolerance=1e-5)
            elif not isinstance(x, torch.Tensor):
                assert x == y, name_


@torch.no_grad()
def test_exponential_activation_is_clamped_alike(monkeypatch):
    layer, token, state = settled_layer(feature_activation="exp")
    layer.key_scale.bias += 100.0
    token = tuple(x * 40 for x in token)
    found, new = native_step.native_step(layer, *token, state)
    monkeypatch.setattr(native_step, "step_function", lambda: None)
    expected, expected_new = layer.attend_step(*token, state)
    assert torch.isfinite(expected).all()
    assert_close(found, expected, "o", tolerance=1e-5)
    assert_close(new.state, expected_new.state, "state", tolerance=1e-5)


@pytest.mark.parametrize(
    "settings", [{"feature_map": "elu"}, {"feature_map": "cosformer"}, {"feature_map": "prf", "feature_activation": "exp"}]
)
def test_what_c_cannot_do_is_left_to_torch(settings):
    layer, token, state = settled_layer(**settings)
    with torch.no_grad():
        assert native_step.native_step(layer, *token, state) is None
    layer, token, state = settled_layer()
    assert native_step.native_step(layer, *token, state) is None  # gradients are wanted
    with torch.no_grad():
        assert native_step.native_step(layer.half(), *(x.half() for x in token), state) is None


def load(tmp_path, source="int answer(void) { return 42; }", **environment) -> str:
    """What `load_library` says in a fresh process with its own cache folder."""
    code = f"""
from dijiang.modeling.native_build import load_library
library, reason = load_library({source!r})
print(library.answer() if library else reason)
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_library_is_compiled_once_and_kept(tmp_path):
    assert load(tmp_path) == "42"
    (library,) = (tmp_path / "cache" / "dijiang").iterdir()
    made = library.stat().st_mtime_ns
    assert load(tmp_path) == "42" and library.stat().st_mtime_ns == made


def test_without_a_working_compiler_there_is_a_reason(tmp_path):
    assert load(tmp_path, DIJIANG_NATIVE="0") == "DIJIANG_NATIVE=0"
    assert load(tmp_path, CC="", PATH=str(tmp_path)) == "no C compiler (cc, gcc or clang) was found"
    assert "cannot compile the kernel" in load(tmp_path, source="this is not C")
    assert "cannot be used" in load(tmp_path, CC="/no/such/compiler")
    assert not [path for path in (tmp_path / "cache" / "dijiang").iterdir() if path.suffix != ".so"]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert load(tmp_path) == "42"


def test_other_processors_get_their_own_library(monkeypatch, tmp_path):
    monkeypatch.setattr(native_build, "cache_folder", lambda: tmp_path)
    for flags in ("flags: avx512f", "flags: avx2"):
        monkeypatch.setattr(native_build, "processor", lambda flags=flags: flags)
        native_build.load_library.__wrapped__("int answer(void) { return 42; }")
    assert len(list(tmp_path.iterdir())) == 2

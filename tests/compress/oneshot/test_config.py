"""What a pruning run may be asked to do."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from dijiang.common.settings import describe, load_settings
from dijiang.compress import PruneConfig
from dijiang.compress.oneshot.config import parse_pattern

WORDS = {
    "method": ("mixed-sparsity",),
    "score": ("isc", "obs", "obd", "isc-b", "isc-c", "wanda", "magnitude"),
    "granularity": ("weight", "layer", "uniform"),
    "allocation": ("rank", "loss"),
    "budget": ("weighted", "shift", "paper"),
    "sensitivity": ("fisher", "hutchinson", "finite-difference", "owl", "local", "random", "reversed"),
    "normalization": ("total", "mean"),
    "row_weights": ("alike", "fisher", "shuffled"),
    "comparison": ("block", "matrix"),
}
COUNTS = ("samples", "sensitivity_samples", "block_size", "held_out_tokens")
TEXT = {"calibration": (Path("book.txt"),)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *[({"sparsity": p}, "must lie between 0 and 1, both left out") for p in (0.0, 1.0, 1.2, -0.1, float("nan"))],
        *[({name: "wand"}, f"{name} 'wand' is unknown.*; choose from {', '.join(known)}$") for name, known in WORDS.items()],
        *[({"alpha": a}, "which must lie from 0 to below 1; set") for a in (0.5, 0.6, -0.1, float("nan"))],
        ({"sparsity": 0.95}, "ask for sparsities from 0.85 to 1.05, which must lie from 0 to below 1; set alpha below 0.05"),
        ({"sparsity": 0.05}, "ask for sparsities from -0.05 to 0.15"),
        ({"pattern": "2:4", "sparsity": 0.3}, "pattern 2:4 removes 0.5 of the weights, sparsity=0.3 was asked for too"),
        ({"pattern": "2:4", "granularity": "weight"}, "is the same for all matrices, so granularity weight has no effect"),
        ({"pattern": "2:4", "granularity": "layer"}, "granularity layer has no effect"),
        *[({"pattern": p}, f"pattern '{p}' is not N:M with 0 < N") for p in ("4:2", "0:4", "4:4", "half", "2:4:8", "-1:4")],
        ({"pattern": "2:4", "row_weights": "fisher"}, "^row_weights has no effect with pattern 2:4; leave it out"),
        ({"pattern": "2:4", "comparison": "matrix"}, "^comparison has no effect with pattern 2:4"),
        ({"score": "wanda", "row_weights": "fisher"}, "^row_weights has no effect with score wanda"),
        ({"score": "magnitude", "comparison": "matrix"}, "^comparison has no effect with score magnitude"),
        (
            {"granularity": "uniform", "allocation": "loss"},
            "^allocation has no effect with granularity uniform",
        ),
        ({"pattern": "2:4", "allocation": "loss"}, "^allocation has no effect with pattern 2:4"),
        ({"pattern": "2:4", "sensitivity": "owl"}, "^sensitivity has no effect with pattern 2:4"),
        ({"granularity": "uniform", "budget": "paper"}, "^budget has no effect with granularity uniform"),
        ({"allocation": "loss", "budget": "shift"}, "^budget has no effect with allocation loss"),
        ({"probes_by_layer": True}, "^probes_by_layer has no effect with sensitivity fisher"),
        ({"score": "magnitude", "true_sequential": True}, "^true_sequential has no effect with score magnitude"),
        ({"allocation": "loss", "sparsity": 0.97}, "^sparsity=0.97 was asked for, but allocation by loss goes up to 0.95$"),
        *[({"bits": bits}, f"bits={bits} must lie between 2 and 8") for bits in (1, 9, 0)],
        *[({name: 0}, f"{name}=0 must be at least 1") for name in COUNTS],
        ({"length": 1}, "length=1 must be at least 2"),
        ({"damping": -0.01}, "damping=-0.01 must be"),
        ({"damping": float("inf")}, "damping=inf must be"),
        ({"owl_m": 0.0}, "owl_m=0.0 must be greater than 0"),
        ({"allocation": "loss", "sparsity": 0.8, "alpha": 0.2}, "allow a matrix 1, but allocation by loss goes up to 0.95"),
        ({"allocation": "loss", "sensitivity": "owl"}, "^sensitivity has no effect with allocation loss"),
        ({"calibration": ()}, "no calibration text given"),
        ({"calibration": (), "score": "magnitude"}, "no calibration text given"),  # ranked by fisher
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        PruneConfig(**(TEXT | settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("weight", 0.5, None, True, True)),
        ({"pattern": "2:4"}, ("uniform", 0.5, (2, 4), False, True)),
        ({"pattern": "1:4", "sparsity": 0.25, "granularity": "uniform"}, ("uniform", 0.25, (1, 4), False, True)),
        ({"granularity": "layer", "sparsity": 0.1}, ("layer", 0.1, None, True, True)),
        ({"granularity": "uniform", "sparsity": 0.97}, ("uniform", 0.97, None, False, True)),  # alpha has no effect
        ({"granularity": "uniform", "score": "magnitude", "calibration": ()}, ("uniform", 0.5, None, False, False)),
        ({"sensitivity": "random", "score": "magnitude", "calibration": ()}, ("weight", 0.5, None, True, False)),
        ({"granularity": "uniform", "score": "wanda"}, ("uniform", 0.5, None, False, True)),
    ],
)
def test_what_is_filled_in(settings, expected):
    config = PruneConfig(**(TEXT | settings))
    assert (config.granularity, config.sparsity, config.zeros_of, config.ranked, config.needs_text) == expected


def test_alpha_of_allocation_by_loss():
    assert PruneConfig(**TEXT, allocation="loss").alpha == pytest.approx(0.2)
    assert PruneConfig(**TEXT, allocation="loss", sparsity=0.9).alpha == pytest.approx(0.05)


def test_texts_may_be_strings():
    for texts in ("a.txt", Path("a.txt"), ["a.txt"], (Path("a.txt"),)):
        config = PruneConfig(calibration=texts, held_out="b.txt")
        assert (config.calibration, config.held_out) == ((Path("a.txt"),), Path("b.txt"))


def test_former_names_are_accepted_with_a_warning(tmp_path):
    with pytest.warns(FutureWarning, match="^normalisation is now called normalization"):
        config = PruneConfig(**TEXT, normalisation="mean")
    assert config == PruneConfig(**TEXT, normalization="mean")
    with pytest.warns(FutureWarning, match="^normalisation is now called normalization"):
        assert load_settings(PruneConfig, words=["normalisation=mean", "calibration=[book.txt]"]) == config
    (tmp_path / "prune.yaml").write_text("normalisation: mean\ncalibration: [book.txt]\n")
    with pytest.warns(FutureWarning, match="^normalisation is now called normalization"):
        assert load_settings(PruneConfig, tmp_path / "prune.yaml") == config
    with pytest.raises(ValueError, match=r"^normalisation is the former name of normalization"):
        PruneConfig(**TEXT, normalisation="mean", normalization="mean")


def test_every_setting_is_described():
    described = describe(PruneConfig)
    assert [name for name, _, _ in described] == [field.name for field in fields(PruneConfig) if field.init]
    assert all(text for _, _, text in described)


def test_settings_need_neither_torch_nor_scipy(tmp_path):
    code = """
import sys
from dijiang.compress import PruneConfig
PruneConfig(calibration="book.txt", sensitivity="owl", bits=4)
print([module for module in ("torch", "scipy", "transformers", "numpy") if module in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_patterns_are_read():
    assert [parse_pattern(text) for text in ("2:4", "1:4", "04:8", "15:16")] == [(2, 4), (1, 4), (4, 8), (15, 16)]


@pytest.mark.parametrize("text", ["", "2", "2:", ":4", "0:4", "4:4", "5:4", "-2:4", "2:4:8", "2 : 4", "2:4\n", "a:b", "2.0:4"])
def test_other_patterns_are_refused(text):
    with pytest.raises(ValueError, match="N zeros in every M weights; write for example 2:4") as caught:
        parse_pattern(text)
    assert repr(text) in str(caught.value) and "\n" not in str(caught.value)

"""A score and a sensitivity of one's own: one function and one entry of a table each."""

import json

import pytest
import torch
from dijiang_testing.pruned_folders import TARGETS, UNIFORM, zeros

from dijiang.compress import PruneConfig
from dijiang.compress.oneshot.scores import SCORES, Score
from dijiang.compress.oneshot.sensitivity.methods import SENSITIVITIES, Method


def right_columns(factor):
    """Every column counts four times as much as the one before."""
    return 4.0 ** torch.arange(len(factor.diagonal))


def position(weight, norms):
    """The first weights of a row go first."""
    return torch.arange(weight.shape[1], dtype=weight.dtype).expand_as(weight)


def by_name(inputs):
    """The later its name comes, the more a matrix matters."""
    ordered = sorted(inputs.sizes)
    estimates = inputs.cached(lambda: {name: [float(ordered.index(name))] for name in inputs.sizes})
    return inputs.sensitivities(estimates)


@pytest.mark.parametrize("score", [Score(column_weights=right_columns), Score(scores=position, within_rows=True)])
def test_a_score(run, make_source, monkeypatch, score):
    monkeypatch.setitem(SCORES, "dummy", score)
    source, _ = make_source()
    settings = {"block_size": 48} | UNIFORM
    for mask in zeros(run(source, score="dummy", **settings)).values():
        assert mask[:, : mask.shape[1] // 2].float().mean() > 0.9 and mask.float().mean() == 0.5


def test_a_sensitivity(run, make_source, monkeypatch):
    monkeypatch.setitem(SENSITIVITIES, "dummy", Method(measure=by_name))
    source, _ = make_source()
    out = run(source, sensitivity="dummy")
    plan = json.loads((out / "pruning_plan.json").read_text())
    targets = {x["name"]: x["target"] for x in plan["matrices"]}
    assert plan["sensitivity"]["method"] == "dummy"
    assert sorted(targets, key=targets.get, reverse=True) == sorted(name.removesuffix(".weight") for name in TARGETS)
    for name, mask in zeros(out).items():
        assert mask.sum() == round(targets[name.removesuffix(".weight")] * mask.numel())


def test_unknown_ones_are_refused_with_all_names(monkeypatch):
    monkeypatch.setitem(SCORES, "dummy", Score(scores=position))
    with pytest.raises(ValueError, match=r"choose from isc, .*, magnitude, dummy$"):
        PruneConfig(calibration="x", score="other")

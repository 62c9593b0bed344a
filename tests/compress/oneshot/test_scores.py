"""Scores of the OBS update against dense inverses. Those without compensation are tested in test_prune_matrix.py."""

import pytest
import torch
from dijiang_testing.pruning_oracles import damp, importance, make_problem, relative

from dijiang.compress.oneshot.hessian import factorize
from dijiang.compress.oneshot.scores import SCORES


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_scores_are_their_formulas(dtype, tolerance):
    _, hessian = make_problem(1, 18, seed=7, dtype=dtype, dead=(3,))
    factor = factorize(hessian, "q")
    values = {name: score.column_weights(factor) for name, score in SCORES.items() if score.column_weights}
    for name, weights in values.items():
        assert relative(weights.double(), importance(name, damp(hessian.double()))) < tolerance, name
        assert not any(torch.allclose(weights, values[other], rtol=0.01) for other in values if other != name)
    assert torch.equal(values["isc"], values["obs"] + values["obd"])
    assert values["obs"][-1].item() == pytest.approx(values["obd"][-1].item(), rel=tolerance)
    assert (values["obd"] >= values["obs"] * (1 - tolerance)).all()

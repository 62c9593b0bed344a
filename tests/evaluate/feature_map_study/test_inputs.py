"""Inputs of the feature map study, and errors on them, against oracles."""

import numpy as np
import pytest
import torch
from dijiang_testing.feature_maps import gaussian_rows, random_case

from dijiang.convert import load_source
from dijiang.evaluate.feature_map_study.inputs import Case, gaussian_inputs, normal_radius_limit, real_inputs
from dijiang.evaluate.feature_map_study.study import limits
from dijiang.train.stages.teacher_pass import run_teacher


def test_in_one_dimension_the_normal_radius_is_unbiased():
    case = Case(gaussian_rows(7, 1, 0), gaussian_rows(5, 1, 1))
    np.testing.assert_allclose(normal_radius_limit(case), case.kernel, rtol=1e-12)


@pytest.mark.parametrize("drop_norm", [False, True])
def test_mix_is_the_plain_sum(drop_norm):
    case = random_case(5, 9, 4, 2)
    mixed = case.mix(case.kernel, drop_norm=drop_norm)
    for i, q in enumerate(case.q):
        visible = range(case.positions[i] + 1)
        norms = [case.k[j] @ case.k[j] / 2 if drop_norm else 0.0 for j in visible]
        weights = np.exp([q @ case.k[j] + case.log_weight[j] + norm for j, norm in zip(visible, norms, strict=True)])
        np.testing.assert_allclose(mixed[i], weights / weights.sum() @ case.v[: len(weights)], rtol=1e-12)


def test_errors_of_estimates_that_are_known():
    case = random_case(6, 8, 4, 3)
    assert {value for name, value in case.errors(case.kernel).items() if name != "attention_dropped"} == {0.0}
    errors = case.errors(1.5 * case.kernel)  # the normaliser hides a common factor
    assert errors["rmse"] == pytest.approx(0.5) and errors["median"] == pytest.approx(0.5)
    assert errors["attention"] == pytest.approx(0.0, abs=1e-12)
    same_norm = Case(case.q, case.k / np.linalg.norm(case.k, axis=1, keepdims=True), case.v, case.positions)
    assert same_norm.errors(same_norm.kernel)["attention_dropped"] == pytest.approx(0.0, abs=1e-12)
    ones = Case(case.q, case.k, case.v, case.positions).mix(np.ones_like(case.kernel))
    assert case.plain_mean() == pytest.approx(
        np.linalg.norm(ones - case.mix(case.kernel)) / np.linalg.norm(case.mix(case.kernel))
    )


def test_real_inputs_are_those_of_the_model(pair, text_file):
    raw, centred = real_inputs(pair.teacher, text_file, tokens=24, query_every=5, heads=9)
    assert len(raw.cases) == 2  # one of each layer, whatever is asked for
    model, tokenizer = load_source(pair.teacher)
    ids = torch.tensor(tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"][:48]).view(2, 24)
    outputs = run_teacher(model, ids).outputs
    head_dim = raw.head_dim
    for inputs, block in ((raw.calibration, 0), (raw.cases, 1), (centred.calibration, 0), (centred.cases, 1)):
        for layer, (head, case) in enumerate(zip((0, 3), inputs, strict=True)):
            assert case.positions.tolist() == [4, 9, 14, 19]
            expected = outputs[layer][block, case.positions, head * head_dim : (head + 1) * head_dim]
            np.testing.assert_allclose(case.mix(case.kernel), expected.numpy(), atol=1e-5)
    for case in centred.calibration:
        np.testing.assert_allclose(case.k.mean(0), 0.0, atol=1e-12)


@pytest.mark.parametrize("d", [4, 64])
def test_gaussian_inputs_have_their_norm_and_calibration_its_own_pairs(d):
    inputs = gaussian_inputs(2.0, d, 33)
    (case,), (calibration,) = inputs.cases, inputs.calibration
    for x in (case.q, case.k, calibration.q, calibration.k):
        assert x.shape == (33, d)
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 2.0)
    assert (case.q != calibration.q).all() and (case.q != case.k).all()
    assert limits(inputs)["query_norm"] == 2.0

"""Statistics of the matrices' inputs against hooks on the whole model that transformers loads."""

import pytest
import torch
from dijiang_testing.pruned_folders import sizes_of

from dijiang.compress.oneshot.hessian import gather_hessians, input_groups
from dijiang.compress.oneshot.sensitivity.layer_statistics import local_traces, outlier_counts


@pytest.mark.parametrize("family", ["llama", "opt", "dijiang"])
def test_statistics_of_the_inputs(both, tokens, family):
    model, decoder = both(family)
    blocks, seen = tokens(20, rows=3), {name: [] for name in sizes_of(decoder)}
    for name, inputs in seen.items():
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, to=inputs: to.append(args[0].double()))
    with torch.no_grad():
        model(blocks)
    squares = {name: torch.cat(inputs).flatten(0, -2).square() for name, inputs in seen.items()}
    weights = {name: model.get_parameter(f"{name}.weight").detach().double() for name in seen}

    traces = local_traces(decoder, blocks, lambda share: None)
    for name, x2 in squares.items():
        assert traces[name] == [pytest.approx(len(weights[name]) * x2.sum(1).mean().item(), rel=1e-5)]

    hidden = [decoder.embed(row) for row in blocks[:, None]]
    for index, names in enumerate(decoder.targets):
        modules = {name: decoder.model.get_submodule(name) for name in names}
        with torch.no_grad(), decoder.layer(index) as layer:
            groups = input_groups(modules, lambda: decoder.run(layer, index, hidden[0]))  # noqa: B023
            with gather_hessians(modules, groups) as hessians:
                hidden = [decoder.run(layer, index, batch) for batch in hidden]
        assert sorted(name for group in groups for name in group) == sorted(names)
        assert len(groups[0]) == 3  # queries, keys and values
        for group, hessian in zip(groups, hessians, strict=True):
            for name in group:  # 2 / N times the sum of squares, N sequences
                expected = 2 / 3 * squares[name].sum(0)
                torch.testing.assert_close(hessian.matrix.diagonal().double(), expected, rtol=1e-5, atol=0)

    scores = {name: weights[name].abs() * squares[name].sum(0).sqrt() for name in seen}
    shares = []
    counts = outlier_counts(decoder, blocks, 3.0, shares.append)
    for names in decoder.targets:
        mean = torch.cat([scores[name].flatten() for name in names]).mean()
        assert [counts[name] for name in names] == [[(scores[name] > 3 * mean).sum().item()] for name in names]
    assert sum(shares) == pytest.approx(1) and sum(values[0] for values in counts.values()) > 20

"""Rows of a cache are selected, repeated and copied exactly."""

from copy import deepcopy

import pytest
import torch
from dijiang_testing.model_checks import CASES, assert_close, random_ids, tiny_model

from dijiang.modeling.cache_dijiang import GrowingRows

each_case = pytest.mark.parametrize("case", CASES)
each_seed = pytest.mark.parametrize("seed", [0, 1, 2])


def cache_tensors(cache) -> list[torch.Tensor]:
    """Every tensor of every layer, rows first."""
    tensors = []
    for layer in cache.layers:
        tensors += layer.tensors() if hasattr(layer, "state") else [layer.keys, layer.values]
    return tensors


@each_seed
@each_case
@torch.no_grad()
def test_cache_rows_are_permuted_selected_and_repeated_exactly(case, seed):
    model, ids, more = tiny_model(seed, **CASES[case]), random_ids(4, 13, seed), random_ids(4, 1, seed + 9)
    cache = model(ids, use_cache=True).past_key_values
    before = [x.clone() for x in cache_tensors(cache)]
    order = torch.tensor([3, 1, 1, 0])
    for operation, rows in (
        (lambda c: c.reorder_cache(order), order),
        (lambda c: c.batch_select_indices(order[:2]), order[:2]),
        (lambda c: c.batch_repeat_interleave(2), torch.arange(4).repeat_interleave(2)),
    ):
        changed = deepcopy(cache)
        operation(changed)
        for result, expected in zip(cache_tensors(changed), before, strict=True):
            assert torch.equal(result, expected[rows])
        expected = model(torch.cat((ids, more), 1)[rows], use_cache=False).logits[:, -1:]
        assert_close(model(more[rows], past_key_values=changed).logits, expected, "logits", tolerance=1e-4)
    assert all(torch.equal(x, y) for x, y in zip(cache_tensors(cache), before, strict=True))


@each_seed
@each_case
@torch.no_grad()
def test_copied_cache_continues_as_the_original_and_on_its_own(case, seed):
    model, ids = tiny_model(seed, **CASES[case]), random_ids(2, 30, seed)
    cache = model(ids[:, :15], use_cache=True).past_key_values
    copy = deepcopy(cache)
    steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(15, 30)]
    assert copy.get_seq_length() == 15 and cache.get_seq_length() == 30
    assert torch.equal(
        torch.cat(steps, 1), torch.cat([model(t, past_key_values=copy).logits for t in ids[:, 15:].split(1, 1)], 1)
    )


@each_seed
@pytest.mark.parametrize("case", [case for case in CASES if case != "mixed"])  # sliding layers of transformers keep views
@torch.no_grad()
def test_measured_bytes_equal_declared_bytes(case, seed):
    """Those of a prompt exactly; steps take spare rows in which kept heads grow, an eighth or 64 tokens at most."""
    model = tiny_model(seed, **CASES[case])
    for T in (1, 13, 57):
        cache = model(random_ids(1, T, seed), use_cache=True).past_key_values
        assert cache.memory_bytes() == model.cache_bytes(T)
        model(random_ids(1, 1, seed), past_key_values=cache)
        spare = max(64, (T + 1) // 8) * model.config.bytes_per_token(4)
        assert model.cache_bytes(T + 1) <= cache.memory_bytes() <= model.cache_bytes(T + 1) + spare
    growth = model.cache_bytes(2001) - model.cache_bytes(2000)
    assert growth == model.config.bytes_per_token(4)
    assert (growth > 0) == (case == "memories")


@torch.no_grad()
def test_rows_of_kept_heads_grow_with_few_copies_and_hold_what_was_appended():
    rows, parts = GrowingRows(), list(torch.randn(2, 3, 700, 4).split([90, *[1] * 600, 10], dim=2))
    buffers = set()
    for i, part in enumerate(parts):
        assert torch.equal(rows.append(part), torch.cat(parts[: i + 1], dim=2))
        buffers.add(rows.buffer.data_ptr())
    assert len(buffers) < 12

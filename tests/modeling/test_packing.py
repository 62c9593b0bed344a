"""Packed rows, several sequences in one row, against the same sequences apart: in the op, in whole models, from a collator."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from dijiang_testing.model_checks import (
    EVERY,
    assert_close,
    assert_same_gradients,
    case_settings,
    gradients,
    op_inputs,
    random_ids,
    random_state,
    tiny_model,
    values_and_gradients,
)
from transformers import DataCollatorWithFlattening

from dijiang.modeling import linear_attention
from dijiang.modeling.packing import group_sequences, sequence_bounds

UNEVEN = (63, 1, 200, 2, 64, 65)
ONE_LONG = (1, 150, 3, 1, 2, 7, 1, 1, 5)
LENGTHS = (9, 1, 17, 2, 6)
MIXED = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "sliding_attention"],
    "sliding_window": 4,
    "decay": "learned",
}


def cu_seqlens(lengths, dtype=torch.long) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def restarts(lengths) -> torch.Tensor:
    """Position ids of a packed row, (1, T)."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


# the op


def apart(lengths, q, k, v, log_decay=None, initial_state=None, **options):
    """One call of linear_attention per sequence."""
    per_token = log_decay is not None and log_decay.dim() == 3
    results = []
    for i, (start, end) in enumerate(zip(cu_seqlens(lengths)[:-1], cu_seqlens(lengths)[1:], strict=True)):
        results.append(
            linear_attention(
                *(x[:, start:end] for x in (q, k, v)),
                log_decay=log_decay[:, start:end] if per_token else log_decay,
                initial_state=initial_state[i : i + 1],
                **options,
            )
        )
    return torch.cat([o for o, _ in results], dim=1), torch.cat([state for _, state in results])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("decay", ["none", "constant", "per_token"])
@pytest.mark.parametrize("lengths", [UNEVEN, ONE_LONG], ids=str)
@pytest.mark.parametrize("mode", ["naive", "chunk", "recurrent"])
def test_op_equals_one_call_per_sequence(mode, lengths, decay, normalize):
    shape = (1, sum(lengths), 4, 2, 5, 3)
    tensors = op_inputs(shape, decay, seed=1)
    tensors["initial_state"] = random_state(shape, normalize, seed=2, sequences=len(lengths))
    options = {"normalize": normalize, "output_final_state": True, "mode": mode}
    results = values_and_gradients(tensors, partial(linear_attention, cu_seqlens=cu_seqlens(lengths), **options))
    for name, expected in values_and_gradients(tensors, partial(apart, lengths, **options)).items():
        assert_close(results[name], expected, name, tolerance=1e-4)


@pytest.mark.parametrize("lengths", [UNEVEN, ONE_LONG], ids=str)
@torch.no_grad()
def test_op_without_gradients_or_states_and_in_bfloat16(lengths):
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        tensors = op_inputs((1, sum(lengths), 4, 2, 5, 3), "per_token", seed=3, dtype=dtype)
        nothing = torch.zeros(len(lengths), 2, 5, 4)
        o, state = linear_attention(**tensors, cu_seqlens=cu_seqlens(lengths, torch.int32))
        assert o.dtype == dtype and state is None
        assert_close(o, apart(lengths, **tensors, initial_state=nothing, output_final_state=True)[0], "o", tolerance)


def test_one_sequence_is_a_plain_row():
    tensors = op_inputs((1, 70, 2, 1, 5, 3), "constant", seed=4)
    expected = linear_attention(**tensors, output_final_state=True)
    results = linear_attention(**tensors, cu_seqlens=torch.tensor([0, 70]), output_final_state=True)
    for name, x, y in zip(("o", "final state"), results, expected, strict=True):
        assert_close(x, y, name)


@pytest.mark.parametrize(
    "bounds",
    [[], [0], [7], [1, 7], [0, 6], [0, 8], [0, 3, 3, 7], [0, 5, 3, 7], [-1, 7], [0, 7, 7], [0, 0, 7]],
    ids=str,
)
def test_wrong_bounds_are_refused(bounds):
    q = torch.rand(1, 7, 2, 4)
    with pytest.raises(ValueError, match=r"cu_seqlens \[.*\] must rise from 0 to the 7 tokens"):
        linear_attention(q, q, q, cu_seqlens=torch.tensor(bounds, dtype=torch.long))


def test_other_wrong_arguments_are_refused():
    q, bounds = torch.rand(1, 7, 2, 4), torch.tensor([0, 3, 7])
    with pytest.raises(ValueError, match=r"cu_seqlens \[0, 1, 2, 3, 4, 5, 6, 7\] \.\.\. must rise from 0 to the 7 tokens"):
        linear_attention(q, q, q, cu_seqlens=torch.arange(12))
    with pytest.raises(ValueError, match="needs one packed row, not a batch of 2"):
        linear_attention(*(x.expand(2, -1, -1, -1) for x in (q, q, q)), cu_seqlens=bounds)
    with pytest.raises(ValueError, match=r"initial_state is \(1, 2, 4, 5\), expected \(2, 2, 4, 5\)"):
        linear_attention(q, q, q, cu_seqlens=bounds, initial_state=torch.zeros(1, 2, 4, 5))


# how sequences are separated and grouped


@pytest.mark.parametrize("lengths", [UNEVEN, ONE_LONG, (1,), (1, 1, 1), (2, 3), (1000,) + (1,) * 500, tuple(range(1, 130))])
def test_groups_hold_every_token_once_and_less_padding_than_tokens(lengths):
    T, starts = sum(lengths), cu_seqlens(lengths)
    groups = group_sequences(starts, T)
    covered = torch.cat([group.index[group.valid] for group in groups])
    assert torch.equal(covered.sort().values, torch.arange(T))
    assert torch.equal(torch.cat([group.sequences for group in groups]).sort().values, torch.arange(len(lengths)))
    assert len(groups) <= max(lengths).bit_length() + 1
    padding = sum(int((~group.valid).sum()) for group in groups)
    assert padding < T, "half of what is computed, or more, is padding"
    numbers = torch.arange(T) + 100
    packed = torch.zeros_like(numbers)
    for group in groups:
        rows = group.unpack(numbers)
        for sequence, row, valid in zip(group.sequences.tolist(), rows, group.valid, strict=True):
            assert torch.equal(row[valid], numbers[starts[sequence] : starts[sequence + 1]])
            assert torch.equal(valid, torch.arange(len(valid)) < lengths[sequence])
        packed = group.pack_into(packed, rows)
    assert torch.equal(packed, numbers)


def test_bounds_of_rows_laid_end_to_end():
    assert sequence_bounds(torch.arange(6).expand(3, 6)) is None
    assert sequence_bounds(torch.arange(6)[None] + 40) is None
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4], [0, 0, 0, 1, 0]])
    assert sequence_bounds(positions).tolist() == [0, 3, 5, 10, 11, 12, 14, 15]
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    padded = torch.tensor([[1, 1, 0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 1, 1]])
    assert sequence_bounds(padded, real) is None


# whole models


def separate_logits(model, ids, lengths) -> torch.Tensor:
    """Logits of every sequence of the row `ids` (1, T) by itself, laid end to end."""
    return torch.cat([model(part, use_cache=False).logits for part in ids.split(list(lengths), dim=1)], dim=1)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_packed_row_equals_separate_rows_forward_and_backward(case):
    model = tiny_model(**case_settings(case))
    ids, targets = random_ids(1, sum(LENGTHS)), random_ids(1, sum(LENGTHS), seed=1)
    results = []
    for logits in (
        lambda: model(ids, position_ids=restarts(LENGTHS), use_cache=False).logits,
        lambda: separate_logits(model, ids, LENGTHS),
    ):
        model.zero_grad()
        packed = logits()
        F.cross_entropy(packed[0], targets[0], reduction="sum").backward()
        results.append((packed.detach(), gradients(model)))
    (packed, packed_gradients), (expected, expected_gradients) = results
    assert_close(packed, expected, "logits", tolerance=1e-4)
    assert_same_gradients(packed_gradients, expected_gradients, tolerance=1e-3)
    with torch.no_grad():
        assert_close(model(ids, position_ids=restarts(LENGTHS)).logits, expected, "without gradients", tolerance=1e-4)
        assert (model(ids).logits - expected).abs().max() > 1e-2 * expected.abs().max()  # what mixing them would show


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_sequences_longer_than_a_piece(dtype):
    lengths = (600, 5, 1100, 40)
    model, ids = tiny_model(decay="learned").to(dtype), random_ids(1, sum(lengths))
    packed = model(ids, position_ids=restarts(lengths)).logits
    assert_close(packed, separate_logits(model, ids, lengths), "logits", tolerance=1e-4 if dtype == torch.float32 else 4e-2)


@pytest.mark.parametrize("settings", [{}, MIXED], ids=["linear", "mixed"])
@torch.no_grad()
def test_several_packed_rows_at_once(settings):
    model, ids = tiny_model(**settings), random_ids(3, 24)
    rows = ((10, 14), (24,), (1, 3, 20))
    packed = model(ids, position_ids=torch.cat([restarts(lengths) for lengths in rows]))
    assert packed.past_key_values is None
    for row, lengths in enumerate(rows):
        expected = separate_logits(model, ids[row : row + 1], lengths)
        assert_close(packed.logits[row : row + 1], expected, f"row {row}", tolerance=1e-4)
    # one list of positions stands for all rows
    packed = model(ids, position_ids=restarts((10, 14))).logits
    expected = torch.cat([separate_logits(model, row[None], (10, 14)) for row in ids])
    assert_close(packed, expected, "shared positions", tolerance=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("argument", ["position_ids", "cu_seq_lens_q", "both"])
def test_all_layer_types_keep_packed_sequences_apart(argument, implementation):
    model, ids = tiny_model(**MIXED), random_ids(1, sum(LENGTHS))
    model.set_attn_implementation(implementation)
    arguments = {"position_ids": restarts(LENGTHS), "cu_seq_lens_q": cu_seqlens(LENGTHS, torch.int32)}
    arguments = arguments if argument == "both" else {argument: arguments[argument]}
    results = []
    for logits in (lambda: model(ids, **arguments, use_cache=False).logits, lambda: separate_logits(model, ids, LENGTHS)):
        model.zero_grad()
        packed = logits()
        F.cross_entropy(packed[0], ids[0], reduction="sum").backward()
        results.append((packed.detach(), gradients(model)))
    assert_close(results[0][0], results[1][0], "logits", tolerance=1e-4)
    assert_same_gradients(results[0][1], results[1][1], tolerance=1e-3)


@pytest.mark.parametrize("labeled", [True, False])
@pytest.mark.parametrize("options", [(True, False), (True, True), (False, True)], ids=str)
@pytest.mark.parametrize("settings", [{}, MIXED], ids=["linear", "mixed"])
def test_batches_of_the_padding_free_collator(settings, options, labeled):
    """position_ids, the arguments of flash attention, or both; labels that are -100 where a sequence begins."""
    model = tiny_model(**settings)
    features = [{"input_ids": random_ids(1, length, seed=length)[0].tolist()} for length in LENGTHS]
    if labeled:  # the first half of each sequence counts for nothing
        for feature in features:
            ids = feature["input_ids"]
            feature["labels"] = [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]
    positions, flash = options
    collator = DataCollatorWithFlattening(return_position_ids=positions, return_flash_attn_kwargs=flash)
    batch = collator(features, return_tensors="pt")
    assert ("position_ids" in batch, "cu_seq_lens_q" in batch) == options and batch["input_ids"].shape == (1, sum(LENGTHS))
    output = model(**batch)
    assert output.past_key_values is None
    logits, losses, count = [], [], 0
    for feature in features:
        ids = torch.tensor([feature["input_ids"]])
        wanted = torch.tensor(feature.get("labels", feature["input_ids"]))[1:]
        logits.append(model(ids, use_cache=False).logits)
        losses.append(F.cross_entropy(logits[-1][0, :-1], wanted, reduction="sum") if len(wanted) else 0.0)
        count += int((wanted != -100).sum())
    assert_close(output.logits, torch.cat(logits, dim=1), "logits", tolerance=1e-4)
    assert_close(output.loss, sum(losses) / count, "loss")
    assert_close(model(**batch, num_items_in_batch=77).loss, sum(losses) / 77, "loss by num_items_in_batch")


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("settings", [{}, MIXED], ids=["linear", "mixed"])
def test_gradient_checkpointing(settings, use_reentrant):
    model, ids = tiny_model(**settings).train(), random_ids(1, sum(LENGTHS))
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(ids, labels=ids, position_ids=restarts(LENGTHS), use_cache=False).loss.backward()
        results.append(gradients(model))
    assert_same_gradients(results[1], results[0])


@pytest.mark.parametrize("argument", ["position_ids", "cu_seq_lens_q"])
@pytest.mark.parametrize("types", [["linear_attention"], ["linear_attention", "full_attention"]], ids=["linear", "mixed"])
@torch.no_grad()
def test_compiled_models_keep_packed_sequences_apart(types, argument):
    """Also where a row that is one sequence came first, and where the next one is packed otherwise."""
    torch._dynamo.reset()
    model, ids = tiny_model(num_hidden_layers=len(types), layer_types=types), random_ids(1, 14)
    compiled = torch.compile(model, backend="eager", dynamic=False)
    assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, "one sequence", 1e-4)
    for lengths in ((9, 5), (2, 12)):
        arguments = {"position_ids": restarts(lengths), "cu_seq_lens_q": cu_seqlens(lengths)}
        packed = compiled(ids, **{argument: arguments[argument]}, use_cache=False).logits
        assert_close(packed, separate_logits(model, ids, lengths), f"{lengths}", tolerance=1e-4)
    torch._dynamo.reset()


def test_compiled_backward_of_packed_rows_equals_eager():
    torch._dynamo.reset()
    model, ids = tiny_model(num_hidden_layers=1, decay="learned"), random_ids(1, 14)
    results = []
    for forward in (model, torch.compile(model, backend="aot_eager", dynamic=False)):
        model.zero_grad()
        forward(ids, labels=ids, position_ids=restarts((9, 5)), use_cache=False).loss.backward()
        results.append(gradients(model))
    assert_same_gradients(results[1], results[0])
    torch._dynamo.reset()


# what comes with packed rows, and what is refused


@torch.no_grad()
def test_no_cache_is_made_unless_rows_are_single_sequences():
    model, ids = tiny_model(), random_ids(1, 8)
    assert model.config.use_cache
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    for arguments in ({}, {"use_cache": True}, {"use_cache": False}, {"attention_mask": torch.ones(1, 8)}):
        assert model(ids, position_ids=packed, **arguments).past_key_values is None
    assert model(ids, cu_seq_lens_q=torch.tensor([0, 4, 8])).past_key_values is None
    for arguments in ({}, {"position_ids": torch.arange(8)[None]}, {"cu_seq_lens_q": torch.tensor([0, 8])}):
        output = model(ids, **arguments)
        assert output.past_key_values.get_seq_length() == 8
        assert_close(output.logits, model(ids).logits, "logits")


@torch.no_grad()
def test_positions_of_padding_and_of_a_continued_row_do_not_restart_it():
    model, ids = tiny_model(), random_ids(1, 8)
    left_padded = {"position_ids": torch.tensor([[1, 1, 1, 0, 1, 2, 3, 4]]), "attention_mask": torch.arange(8)[None] >= 3}
    assert_close(model(ids, **left_padded).logits[:, 3:], model(ids[:, 3:]).logits, "left-padded", tolerance=1e-4)
    right_padded = {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 1, 1, 1]]), "attention_mask": torch.arange(8)[None] < 5}
    assert_close(model(ids, **right_padded).logits[:, :5], model(ids[:, :5]).logits, "right-padded", tolerance=1e-4)
    cache = model(ids[:, :5]).past_key_values
    packed = model(ids[:, 5:], position_ids=torch.arange(5, 8)[None], past_key_values=cache).logits
    assert_close(packed, model(ids).logits[:, 5:], "continued", tolerance=1e-4)


@pytest.mark.parametrize(
    ("mask", "positions"),
    [
        ([0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 2, 0, 1, 2]),
        ([1, 1, 1, 1, 1, 1, 0, 0], [0, 1, 2, 0, 1, 2, 1, 1]),
        ([1, 1, 1, 1, 0, 1, 1, 1], [0, 1, 0, 1, 0, 0, 1, 2]),
        ([1, 1, 1, 0, 1, 1, 1, 1], [0, 1, 2, 0, 0, 1, 2, 3]),  # the padding stands where the second one begins
        ([1, 1, 1, 0, 0, 1, 1, 1], [0, 1, 2, 3, 4, 0, 1, 2]),
    ],
)
def test_padding_in_packed_rows_is_refused(mask, positions):
    model, ids = tiny_model(), random_ids(1, 8)
    with pytest.raises(ValueError, match=r"packed rows .* with padding are not supported"):
        model(ids, attention_mask=torch.tensor([mask]), position_ids=torch.tensor([positions]))


def test_a_cache_with_packed_rows_is_refused():
    model, ids = tiny_model(), random_ids(1, 8)
    cache = model(ids, use_cache=True).past_key_values
    for arguments in ({"position_ids": torch.tensor([[8, 9, 10, 0, 1, 2, 3, 4]])}, {"cu_seq_lens_q": torch.tensor([0, 3, 8])}):
        with pytest.raises(ValueError, match="a cache holds one sequence per row; packed rows need use_cache=False"):
            model(ids, **arguments, past_key_values=cache)


def test_bounds_that_do_not_fit_the_rows_are_refused():
    model, ids = tiny_model(), random_ids(2, 8)
    for bounds in ([0, 4, 9], [0, 4, 7], [1, 4, 8], [0, 4, 4, 8]):
        with pytest.raises(ValueError, match="must rise from 0 to the 8 tokens"):
            model(ids[:1], cu_seq_lens_q=torch.tensor(bounds))
    with pytest.raises(ValueError, match="cu_seq"):  # they are those of a single row
        model(ids, cu_seq_lens_q=torch.tensor([0, 4, 8]))
    with pytest.raises(ValueError, match="must rise from 0 to the 8 tokens"):
        model(ids[:1], cu_seq_lens_q=torch.tensor([0, 5]))


def test_softmax_layers_alone_take_packed_rows_as_transformers_does():
    model, ids = tiny_model(layer_types=["full_attention"] * 2), random_ids(1, sum(LENGTHS))
    packed = model(ids, position_ids=restarts(LENGTHS), use_cache=False).logits
    assert_close(packed, separate_logits(model, ids, LENGTHS), "logits", tolerance=1e-4)


def test_float16_sums_beyond_its_range_stay_finite_in_packed_rows():
    """The numerator is divided before it is stored: 2,000 tokens of 64 features of 1 sum to twice what float16 holds."""
    ones = torch.ones(1, 2000, 1, 64, dtype=torch.float16)
    values = ones[..., :4]
    o, _ = linear_attention(ones, ones, values, cu_seqlens=torch.tensor([0, 2000]))
    assert_close(o, values, "o", tolerance=1e-3)

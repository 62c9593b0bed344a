"""The align stage's loss and gradients against the plainest way to write them."""

from contextlib import nullcontext

import pytest
import torch

from dijiang.convert import PRESETS, load_source
from dijiang.evaluate import perplexity
from dijiang.modeling.linear_attention_layer import linear_layers
from dijiang.train.recipe.schema import AlignConfig
from dijiang.train.stages.align import AlignModel, linear_branch_alone
from dijiang.train.stages.parameters import added_parameters
from dijiang.train.stages.teacher_pass import run_teacher

WINDOWLESS = {"layer_types": "linear_attention", "attention_window": 0, "attention_sinks": 0}


@pytest.fixture
def make(pair):
    """make(conversion settings, **config) -> AlignModel of the tiny pair, in training mode."""

    def build(conversion=None, dtype=torch.float32, **config):
        teacher, _ = load_source(pair.teacher, dtype=dtype)
        source, settings = (pair.teacher, conversion) if conversion else (pair.checkpoint, {})
        student, _ = load_source(source, dtype=dtype, **settings)
        return AlignModel(student, teacher, AlignConfig(**config), dtype).train()

    return build


def plain_losses(model, ids, positions=None, weights=(1.0, 0.0), after=False) -> dict[int, torch.Tensor]:
    """By layer: relative squared errors of the combined output and of the linear branch, weighted; all graphs kept."""
    kept = run_teacher(model.teacher, ids, positions)
    losses = {}
    for i, attention in linear_layers(model.student).items():
        q, k, v, _ = attention.project(kept.inputs[i], kept.position_embeddings)
        target, total = kept.outputs[i], 0
        if after:
            target = model.teacher.model.layers[i].self_attn.o_proj(target)
        for weight, context in zip(weights, (nullcontext(), linear_branch_alone(attention)), strict=True):
            if weight:
                with context:
                    output = attention.attend(q, k, v)[0].flatten(2)
                output = attention.o_proj(output) if after else output
                total = total + weight * (output - target).square().sum() / target.square().sum()
        losses[i] = total
    return losses


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.student.named_parameters() if p.grad is not None}


CASES = [
    (None, {}),
    (None, {"combined_weight": 0.5, "linear_weight": 2.0}),
    (None, {"combined_weight": 0.0, "linear_weight": 1.0}),
    (None, {"trains": "attention"}),
    (WINDOWLESS, {}),
    (WINDOWLESS | {"decay": "learned", "feature_map": "hedgehog"}, {"trains": "attention"}),
    (PRESETS["linear"] | {"layer_types": "linear_attention", "branch_scale_init": 0.5}, {"trains": "attention"}),
]


@pytest.mark.parametrize("partitioned", [False, True])
@pytest.mark.parametrize(("conversion", "settings"), CASES)
def test_loss_and_gradients_are_the_plain_ones(make, tokens, conversion, settings, partitioned):
    model, ids = make(conversion, **settings), tokens(23)
    after = model.stage.trains == "attention"
    expected = plain_losses(model, ids, weights=(model.stage.combined_weight, model.stage.linear_weight), after=after)
    (sum(expected.values()) / 2 * 3).backward()
    wanted = gradients(model)
    model.zero_grad(set_to_none=True)
    if partitioned:  # as ZeRO-3 marks what it shares out
        model.student.lm_head.weight.ds_id = 0
    found = model(ids)
    (found["loss"] * 3).backward()
    assert found["loss"].item() == pytest.approx(sum(x.item() for x in expected.values()) / 2, rel=1e-5)
    assert {name: x.item() for name, x in found.items() if name != "loss"} == pytest.approx(
        {f"layer_{i:02d}": x.item() for i, x in expected.items()}, rel=1e-5
    )
    got = gradients(model)
    assert wanted and got.keys() >= wanted.keys()
    for name, x in got.items():
        expected = wanted.get(name, torch.zeros_like(x))
        assert (x - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1e-2), name


def test_what_trains_and_at_which_rate(make):
    model = make(trains="attention", kernel_learning_rate=0.3, attention_learning_rate=0.01)
    kernel, attention = model.parameter_groups()
    assert (kernel["name"], kernel["lr"], attention["name"], attention["lr"]) == ("kernel", 0.3, "attention", 0.01)
    named = {id(p): name for name, p in model.student.named_parameters()}
    assert {named[id(p)] for p in kernel["params"]} == added_parameters(model.student).keys()
    assert {named[id(p)].split(".")[-2] for p in attention["params"]} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    trained = {name for name, p in model.student.named_parameters() if p.requires_grad}
    assert trained == {named[id(p)] for group in model.parameter_groups() for p in group["params"]}
    assert [group["name"] for group in make().parameter_groups()] == ["kernel"]


def test_a_layers_gradient_does_not_depend_on_the_other_layers(make, tokens):
    model, ids = make(trains="attention"), tokens(20)
    model(ids)["loss"].backward()
    first = {name: x.clone() for name, x in gradients(model).items() if ".layers.0." in name}
    with torch.no_grad():
        for p in added_parameters(model.student).values():
            p.grad = None
        for name, p in model.student.named_parameters():
            if ".layers.1.self_attn" in name:
                p.mul_(1.5)
    model.zero_grad(set_to_none=True)
    model(ids)["loss"].backward()
    for name, x in first.items():
        assert torch.equal(x, gradients(model)[name]), name


def test_documents_of_a_row_are_compared_on_their_own(make, tokens):
    model, ids = make(), tokens(30)[:1]
    lengths = (11, 19)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(ids, positions)
    squares = {i: [0.0, 0.0] for i in (0, 1)}
    for part in ids.split(lengths, dim=1):
        kept = run_teacher(model.teacher, part)
        for i, attention in linear_layers(model.student).items():
            output = attention.attend(*attention.project(kept.inputs[i], kept.position_embeddings)[:3])[0].flatten(2)
            squares[i][0] += (output - kept.outputs[i]).square().sum().item()
            squares[i][1] += kept.outputs[i].square().sum().item()
    for i, (error, target) in squares.items():
        assert packed[f"layer_{i:02d}"].item() == pytest.approx(error / target, rel=1e-4)
    assert packed["loss"].item() != pytest.approx(model(ids)["loss"].item(), rel=1e-3)


def test_window_dropout_is_decided_by_the_sequences_number_alone(make, tokens):
    model, ids = make(window_dropout=0.3, seed=5), tokens(20)
    with_window, alone = (sum(x.item() for x in plain_losses(model, ids, weights=w).values()) / 2 for w in ((1, 0), (0, 1)))
    found = [model(ids, sample_indices=torch.tensor([index]))["loss"].item() for index in range(60)]
    dropped = [loss == pytest.approx(alone, rel=1e-5) for loss in found]
    assert all(drop or loss == pytest.approx(with_window, rel=1e-5) for drop, loss in zip(dropped, found, strict=True))
    assert 8 <= sum(dropped) <= 28  # 18 are expected
    assert not hasattr(model, "config"), "trackers would take it for one of transformers"
    together = make(window_dropout=0.3, seed=5, batch_size=4)  # all sequences of a step decide alike
    assert [together.drops_window(torch.tensor([index])) for index in range(240)] == [x for x in dropped for _ in range(4)]
    again = make(window_dropout=0.3, seed=5)
    assert [again.drops_window(torch.tensor([index])) for index in range(60)] == dropped
    assert [make(window_dropout=0.3, seed=6).drops_window(torch.tensor([p])) for p in range(60)] != dropped


def test_bfloat16_computes_in_half_and_keeps_what_trains_in_full(make, tokens):
    ids, settings = tokens(24), {"trains": "attention"}
    exact, half = make(**settings), make(dtype=torch.bfloat16, **settings)
    losses = [model(ids)["loss"] for model in (exact, half)]
    losses[1].backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.1) and losses[1].dtype == torch.float32
    kept = {p.requires_grad: p.dtype for name, p in half.student.named_parameters() if ".mlp." in name or "_proj" in name}
    assert kept == {True: torch.float32, False: torch.bfloat16}
    assert all(x.dtype == torch.float32 and torch.isfinite(x).all() for x in gradients(half).values())


def test_evaluation_is_the_students_next_token_loss(make, tokens):
    model, ids = make().eval(), tokens(24)
    with torch.no_grad():
        found = model(ids)
    assert found.keys() == {"loss"} and found["loss"].exp().item() == pytest.approx(perplexity(model.student, ids), rel=1e-5)


def test_calibration_lowers_the_loss_and_makes_a_silent_branch_heard(make, tokens):
    model, ids = make(), tokens(40)
    before = model(ids)["loss"].item()
    fit = model.calibrate(ids)
    assert -1 <= fit <= 1 and model(ids)["loss"].item() < before


@pytest.mark.parametrize(
    ("conversion", "config", "message"),
    [
        ({"layer_types": "full_attention"}, {}, "no linear-attention layer"),
        ({"layer_types": "linear_attention", "output_gate": True}, {}, "output_norm or output_gate"),
        (WINDOWLESS, {"linear_weight": 1.0}, "no effect without a window"),
        (WINDOWLESS, {"window_dropout": 0.5}, "no effect without a window"),
        (WINDOWLESS | {"feature_map": "elu", "key_scale": False}, {}, "conversion added no parameters"),
    ],
)
def test_what_cannot_be_aligned_is_refused(make, conversion, config, message):
    with pytest.raises(ValueError, match=message):
        make(conversion, **config)

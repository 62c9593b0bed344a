"""Ablations equal models built without the part that they take away, and leave the model as it was."""

import pytest
import torch

from dijiang.convert import convert_model, load_source
from dijiang.evaluate import linear_only, no_attention, no_memory, window_only
from dijiang.modeling import DiJiangConfig, DiJiangForCausalLM

WINDOW, SINKS, LENGTH = 4, 2, 25


@pytest.fixture
def model(pair):
    """The converted model, its kernels moved from their start."""
    model = load_source(pair.checkpoint)[0]
    assert {(layer.self_attn.window, layer.self_attn.sinks) for layer in model.model.layers} == {(WINDOW, SINKS)}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dtype == torch.float32 and any(part in name for part in ("feature_map", "_scale")):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def rebuilt(model, **config) -> DiJiangForCausalLM:
    """A model of another config with all of `model`'s weights that fit."""
    other = DiJiangForCausalLM(DiJiangConfig(**{**model.config.to_diff_dict(), **config})).eval()
    report = other.load_state_dict(model.state_dict(), strict=False)
    assert not report.missing_keys
    return other


@torch.no_grad()
def logits(model, ids, **kwargs) -> torch.Tensor:
    return model(ids, use_cache=False, **kwargs).logits


def test_window_only_is_softmax_on_window_and_sinks(model, tokens):
    ids = tokens(LENGTH)
    with torch.no_grad():
        model.model.layers[0].self_attn.branch_scale.weight[0] *= 1e5  # whatever the scale was
    softmax = rebuilt(model, layer_types=["full_attention"] * 2, attn_implementation="eager")
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    seen = (key <= query) & ((query - key < WINDOW) | (key < SINKS))
    mask = torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(~seen, torch.finfo(torch.float32).min)
    with window_only(model) as ablated:
        without_part = logits(ablated, ids)
    assert (without_part - logits(softmax, ids, attention_mask={"full_attention": mask})).abs().max() < 1e-4
    assert (without_part - logits(softmax, ids)).abs().max() > 0.1  # the window matters
    assert (without_part - logits(model, ids)).abs().max() > 0.1  # the linear branch was heard


def test_linear_only_is_a_model_without_window(model, tokens):
    ids = tokens(LENGTH)
    without = rebuilt(model, attention_window=0, attention_sinks=0)
    with linear_only(model) as ablated:
        without_part = logits(ablated, ids)
    assert torch.equal(without_part, logits(without, ids))
    assert (without_part - logits(model, ids)).abs().max() > 0.1
    with window_only(model) as ablated:
        assert (without_part - logits(ablated, ids)).abs().max() > 0.1


def test_linear_only_of_a_fresh_conversion(pair, tokens, tmp_path):
    settings = {"attention_window": 0, "attention_sinks": 0}
    without = load_source(convert_model(pair.teacher, tmp_path / "out", progress=False, **settings))[0]
    with linear_only(load_source(pair.checkpoint)[0]) as ablated:
        assert torch.equal(logits(ablated, tokens(LENGTH)), logits(without, tokens(LENGTH)))


def test_no_attention_is_a_model_whose_output_projections_are_zero(model, tokens):
    ids = tokens(LENGTH)
    without = rebuilt(model)
    with torch.no_grad():
        for layer in without.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    with no_attention(model) as ablated:
        without_part = logits(ablated, ids)
    assert torch.equal(without_part, logits(without, ids))
    shuffled = ids.clone()
    shuffled[:, :-1] = ids[:, :-1].flip(1)
    with no_attention(model) as ablated:  # the last token knows nothing of those before it
        assert torch.equal(logits(ablated, shuffled)[:, -1], without_part[:, -1])
    assert (without_part - logits(model, ids)).abs().max() > 0.1


def test_no_attention_leaves_full_layers_alone(pair, tokens):
    hybrid = load_source(pair.teacher, layer_types=["full_attention", "linear_attention"])[0]
    with torch.no_grad():
        expected = load_source(pair.teacher)[0]
        expected.model.layers[1].self_attn.o_proj.weight.zero_()
    with no_attention(hybrid) as ablated:
        assert torch.allclose(logits(ablated, tokens(LENGTH)), logits(expected, tokens(LENGTH)), atol=1e-5)


@pytest.mark.parametrize("ablation", [window_only, linear_only, no_attention])
def test_the_model_is_itself_again(model, tokens, ablation):
    ids = tokens(LENGTH)
    before, weights = logits(model, ids), {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def check():
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
        assert {(layer.self_attn.window, layer.self_attn.sinks) for layer in model.model.layers} == {(WINDOW, SINKS)}
        assert torch.equal(logits(model, ids), before)

    with ablation(model) as ablated:
        assert ablated is model and not torch.equal(logits(model, ids), before)
    check()
    with pytest.raises(KeyError), ablation(model):
        raise KeyError
    check()


def test_ablations_hold_while_decoding(model, tokens):
    """Token by token through the cache, as all at once."""
    ids = tokens(LENGTH)
    for ablation in (window_only, linear_only, no_attention):
        with ablation(model), torch.no_grad():
            whole, cache, steps = logits(model, ids), None, []
            for t in range(LENGTH):
                output = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
                steps.append(output.logits)
                cache = output.past_key_values
        assert (torch.cat(steps, dim=1) - whole).abs().max() < 1e-4


@pytest.mark.parametrize("ablation", [window_only, linear_only, no_attention])
def test_softmax_models_have_nothing_to_take_away(pair, tokens, ablation):
    teacher = load_source(pair.teacher)[0]
    expected = logits(teacher, tokens(LENGTH))
    with ablation(teacher):
        assert torch.equal(logits(teacher, tokens(LENGTH)), expected)


def test_without_a_window_there_is_no_window_only(pair, refused, tmp_path):
    settings = {"layer_types": "linear_attention", "attention_window": 0, "attention_sinks": 0}
    model = load_source(pair.teacher, **settings)[0]
    message = "^a linear layer of this model has attention_window=0, so nothing is left without its linear branch$"
    refused(tmp_path, lambda: window_only(model).__enter__(), message)


# --- exact memory and kept heads ---

MEMORY = {"attention_memory": [[3, 5], [0, 4]], "memory_score": "key_norm"}
KEPT = {"full_heads": [[1], []]}


@pytest.fixture
def remembering(pair):
    """Converted with slots in three heads and a kept head in the fourth."""
    settings = {"attention_window": WINDOW, "attention_sinks": SINKS, "branch_scale_init": 0.5}
    return load_source(pair.teacher, layer_types="linear_attention", **settings, **MEMORY, **KEPT)[0]


def test_no_memory_is_a_model_without_slots(remembering, tokens):
    ids = tokens(LENGTH)
    without = rebuilt(remembering, attention_memory=0)
    with no_memory(remembering) as ablated:
        without_part = logits(ablated, ids)
    assert torch.equal(without_part, logits(without, ids))
    assert (without_part - logits(remembering, ids)).abs().max() > 1e-3


def test_linear_only_takes_the_memory_too_and_leaves_kept_heads(remembering, tokens):
    ids = tokens(LENGTH)
    without = rebuilt(remembering, attention_window=0, attention_sinks=0, attention_memory=0)
    assert without.config.full_heads == KEPT["full_heads"]
    with linear_only(remembering) as ablated:
        assert torch.equal(logits(ablated, ids), logits(without, ids))


def test_window_only_keeps_slots_and_kept_heads(remembering, tokens):
    """The same as a model whose linear branch never had any weight."""
    ids = tokens(LENGTH)
    silent = rebuilt(remembering)
    with torch.no_grad():
        for layer in silent.model.layers:
            layer.self_attn.branch_scale.bias.fill_(-1e4)
    with window_only(remembering) as ablated:
        assert torch.equal(logits(ablated, ids), logits(silent, ids))
        with no_memory(remembering):
            assert (logits(ablated, ids) - logits(silent, ids)).abs().max() > 1e-3


@pytest.mark.parametrize("ablation", [window_only, linear_only, no_attention, no_memory])
def test_a_remembering_model_is_itself_again(remembering, tokens, ablation):
    ids = tokens(LENGTH)
    before = logits(remembering, ids)
    slots = [layer.self_attn.slots for layer in remembering.model.layers]
    with ablation(remembering):
        assert not torch.equal(logits(remembering, ids), before)
    with pytest.raises(KeyError), ablation(remembering):
        raise KeyError
    assert [layer.self_attn.slots for layer in remembering.model.layers] == slots and any(map(any, slots))
    assert torch.equal(logits(remembering, ids), before)

"""Heads that keep every token: all of them are the softmax model, some of them are softmax beside linear heads."""

import pytest
import torch
from dijiang_testing.model_checks import assert_close, random_ids, rows, tiny_config, tiny_model

from dijiang.modeling import DiJiangForCausalLM
from dijiang.modeling.kept_heads import join_heads, runs, take_heads


def same_weights(model, **overrides):
    """A model of other settings with the projections, norms and MLPs of `model`."""
    other = tiny_model(**overrides)
    other.load_state_dict({name: x for name, x in model.state_dict().items() if name in other.state_dict()}, strict=False)
    return other


def test_runs_of_heads():
    assert runs([0, 1, 3, 5, 6]) == [(0, 2), (3, 4), (5, 7)] and runs([]) == [] and runs([2]) == [(2, 3)]


@pytest.mark.parametrize("heads", [[0], [1, 2], [0, 2], [0, 3], [1, 3]], ids=str)
def test_heads_are_taken_apart_and_joined_again(heads):
    x, others = rows(2, 5, 12, 4), [head for head in range(4) if head not in heads]
    kept = take_heads(x, heads, 3)
    assert torch.equal(kept, torch.cat([x[:, :, 3 * head : 3 * head + 3] for head in heads], dim=2))
    assert torch.equal(join_heads(kept, take_heads(x, others, 3), heads, others, 3), x)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_all_heads_kept_are_the_softmax_model(implementation):
    softmax = tiny_model(layer_types=["full_attention"] * 2)
    kept = same_weights(softmax, full_heads=[[0, 1], [0, 1]])
    assert not kept.config.has_linear_layers
    for model in (softmax, kept):
        model.set_attn_implementation(implementation)
    ids = random_ids(2, 40)
    assert_close(kept(ids).logits, softmax(ids).logits, "logits", tolerance=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("heads", [[[0], [1]], [[1], []], [[0, 1], [1]]], ids=str)
@torch.no_grad()
def test_kept_heads_beside_a_window_for_everything_are_the_softmax_model(heads, implementation):
    """Padded rows, packed rows and plain ones: kept heads run through other masks and functions than the window."""
    softmax = tiny_model(layer_types=["full_attention"] * 2)
    kept = same_weights(softmax, full_heads=heads, attention_window=64)
    for model in (softmax, kept):
        model.set_attn_implementation(implementation)
    ids = random_ids(3, 40)
    mask = torch.arange(40) >= torch.tensor([[0], [11], [30]])
    packed = {"position_ids": torch.cat((torch.arange(25), torch.arange(15)))[None], "use_cache": False}
    assert_close(kept(ids).logits, softmax(ids).logits, "plain")
    padded = [model(ids, attention_mask=mask.long()).logits[mask] for model in (kept, softmax)]
    assert_close(*padded, "padded")
    assert_close(kept(ids[:1], **packed).logits, softmax(ids[:1], **packed).logits, "packed")


@torch.no_grad()
def test_no_heads_and_no_slots_change_nothing():
    """Bit for bit, and not a parameter more."""
    plain, ids = tiny_model(), random_ids(2, 90)
    named = tiny_model(full_heads=[[], []], attention_memory=[[0, 0], [0, 0]], memory_score="learned")
    assert plain.state_dict().keys() == named.state_dict().keys()
    assert torch.equal(plain(ids).logits, named(ids).logits)


def test_kept_heads_have_no_weights_of_a_linear_state():
    model = DiJiangForCausalLM(tiny_config(full_heads=[[1], []], decay="retnet"))
    sizes = [
        {name: x.shape[0] for name, x in layer.self_attn.named_parameters() if "_proj" not in name and x.dim()}
        for layer in model.model.layers
    ]
    assert all(2 * sizes[0][name] == sizes[1][name] for name in sizes[1] if "T" in name or "scale" in name)
    # the head that is left decays as it did among all
    assert model.model.layers[0].self_attn.decay.log_rate[0] == model.model.layers[1].self_attn.decay.log_rate[0]


def test_gradients_reach_kept_heads_as_in_the_softmax_model():
    softmax, ids = tiny_model(layer_types=["full_attention"] * 2), random_ids(2, 30)
    kept = same_weights(softmax, full_heads=[[0], [1]], attention_window=64)
    gradients = []
    for model in (kept, softmax):
        model(ids, labels=ids).loss.backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert_close(*gradients, "k_proj", tolerance=1e-4)


def test_pieces_with_one_cache_give_the_gradient_of_the_whole():
    """Also where the kept heads' keys need no gradient, but what reads them does."""
    model, ids = tiny_model(full_heads=[[1], []]), random_ids(2, 30)
    model.requires_grad_(False)
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    gradients = []
    for sizes in ((30,), (10, 12, 8)):
        cache, logits = None, []
        for piece in ids.split(sizes, dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        gradients += torch.autograd.grad(torch.cat(logits, 1).square().sum(), weight)
    assert_close(*gradients, "q_proj", tolerance=1e-4)


def test_a_cache_of_inference_mode_goes_on_outside():
    model, ids = tiny_model(full_heads=[[1], [0]]), random_ids(2, 30)
    with torch.inference_mode():
        cache = model(ids[:, :20], use_cache=True).past_key_values
        model(ids[:, 20:21], past_key_values=cache)
    with torch.no_grad():
        result = model(ids[:, 21:22], past_key_values=cache).logits
        assert_close(result, model(ids[:, :22]).logits[:, 21:], "logits")

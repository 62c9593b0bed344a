"""Outputs, losses and training behavior that users of transformers rely on, and clear refusals of what cannot work."""

import pytest
import torch
from dijiang_testing.model_checks import assert_close, random_ids, tiny_config, tiny_model
from transformers import DynamicCache

from dijiang.modeling import DiJiangForSequenceClassification

MIXED = {"layer_types": ["linear_attention", "full_attention"]}


def test_hidden_states_attentions_and_tuples():
    model, ids = tiny_model(**MIXED), random_ids(2, 9)
    model.set_attn_implementation("eager")
    output = model(ids, output_hidden_states=True, output_attentions=True, use_cache=False)
    assert len(output.hidden_states) == 3
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    (weights,) = [x for x in output.attentions if x is not None]  # the linear layer has none
    assert_close(weights.sum(-1), torch.ones(2, 6, 9), "attention weights")
    assert torch.equal(model(ids, return_dict=False, use_cache=False)[0], output.logits)


def test_eager_equals_sdpa():
    model, ids = tiny_model(**MIXED), random_ids(2, 19)
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[0, :4] = 0
    logits = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        logits.append(model(ids, attention_mask=mask).logits[mask.bool()])
    assert_close(*logits, "logits")


def test_inputs_embeds_equal_input_ids_and_both_or_neither_are_refused():
    model, ids = tiny_model(), random_ids(2, 11)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**arguments)


@pytest.mark.parametrize("tokens", [1, 4, torch.tensor([0, 3, 10])], ids=str)
def test_logits_to_keep(tokens):
    model, ids = tiny_model(), random_ids(2, 11)
    rows = slice(-tokens, None) if isinstance(tokens, int) else tokens
    assert_close(model(ids, logits_to_keep=tokens).logits, model(ids).logits[:, rows], "logits")


def test_loss_is_the_shifted_cross_entropy_over_wanted_tokens():
    model, ids = tiny_model(), random_ids(3, 14)
    labels = ids.clone()
    labels[0, :6] = -100
    output = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].reshape(-1, 97), labels[:, 1:].flatten())
    assert_close(output.loss, expected, "loss")
    summed = model(ids, labels=labels, num_items_in_batch=100).loss
    assert_close(summed, expected * (labels[:, 1:] != -100).sum() / 100, "loss by num_items_in_batch")


def test_gradient_checkpointing_changes_nothing():
    model, ids = tiny_model(decay="learned"), random_ids(2, 33)
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        assert_close(gradients[1][name], gradients[0][name], name)


def test_a_few_steps_overfit_one_batch():
    model, ids = tiny_model(initializer_range=0.1), random_ids(2, 20)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3


def test_tied_embeddings_and_resizing():
    model, ids = tiny_model(tie_word_embeddings=True), random_ids(1, 8)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = model(ids).logits
    model.resize_token_embeddings(105)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_close(model(ids).logits[..., :97], before, "logits")


@pytest.mark.parametrize("side", ["left", "right"])
def test_classifier_reads_the_last_real_token_of_each_row(side):
    torch.manual_seed(0)
    model = DiJiangForSequenceClassification(tiny_config(num_labels=3, pad_token_id=0)).eval()
    lengths, T = (4, 13), 13
    ids, mask = torch.zeros(2, T, dtype=torch.long), torch.zeros(2, T, dtype=torch.long)
    rows = [random_ids(1, length, seed=length).clamp_min(1)[0] for length in lengths]
    for i, row in enumerate(rows):
        place = slice(T - len(row), T) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    expected = torch.cat([model(row[None]).logits for row in rows])
    assert_close(model(ids, attention_mask=mask).logits, expected, "by mask", tolerance=1e-4)
    if side == "right":  # without a mask the padding token says where a row ends
        assert_close(model(ids).logits, expected, "by pad_token_id", tolerance=1e-4)
    loss = model(ids, attention_mask=mask, labels=torch.tensor([2, 0])).loss
    assert_close(loss, torch.nn.functional.cross_entropy(expected, torch.tensor([2, 0])), "loss", tolerance=1e-4)


def test_classifier_refuses_rows_it_cannot_tell_from_padding():
    model = DiJiangForSequenceClassification(tiny_config(num_labels=3))
    assert model(random_ids(1, 5)).logits.shape == (1, 3)
    with pytest.raises(ValueError, match="attention_mask, or a pad_token_id"):
        model(random_ids(2, 5))


def test_foreign_caches_and_masks_are_refused():
    model, ids = tiny_model(), random_ids(1, 8)
    with pytest.raises(ValueError, match="DynamicCache; linear layers need a DiJiangCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 1, 8, 8\)"):
        model(ids, attention_mask=torch.zeros(1, 1, 8, 8))
    cache = model(ids, use_cache=True).past_key_values
    for length in (3, 8, 12):
        with pytest.raises(ValueError, match=rf"shape \(1, {length}\); linear layers need \(batch, 11\), 8 tokens"):
            model(ids[:, :3], attention_mask=torch.ones(1, length), past_key_values=cache)
    with pytest.raises(ValueError, match="cache_implementation='static' is not supported"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)


def test_modes_that_take_tokens_back_are_refused_with_linear_layers_only():
    model, ids = tiny_model(), random_ids(1, 8)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=4)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-2)
    softmax = tiny_model(layer_types=["full_attention"] * 2)
    expected = softmax.generate(ids, max_new_tokens=12, do_sample=False)
    tokens = softmax.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=2)
    assert torch.equal(tokens, expected)

"""The same model with other memories: in memory, and on disk."""

import pytest
import torch
from dijiang_testing.model_checks import assert_close, random_ids, tiny_model
from safetensors import safe_open

from dijiang.checkpoint.provenance import read_provenance, write_provenance
from dijiang.convert import convert_model, load_source
from dijiang.convert.memories import with_memories, write_with_memories
from dijiang.modeling import DiJiangForCausalLM


@torch.no_grad()
def test_weights_are_shared_and_the_parts_of_linear_heads_follow_their_heads():
    """Each linear head answers as it did when it was beside the one that keeps every token now."""
    model = tiny_model(decay="learned", attention_memory=3, memory_score="learned")
    kept = with_memories(model, full_heads=[[1], [0]])
    assert kept.model.layers[0].mlp.up_proj.weight.data_ptr() == model.model.layers[0].mlp.up_proj.weight.data_ptr()
    q, k, v, raw_k = (
        torch.randn(2, 40, heads, 8, generator=torch.Generator().manual_seed(i)) for i, heads in enumerate((6, 2, 2, 2))
    )
    for layer, head in ((0, 0), (1, 1)):
        before, after = (x.model.layers[layer].self_attn for x in (model, kept))
        own_q, own = slice(3 * head, 3 * head + 3), slice(head, head + 1)
        expected = before.attend(q, k, v, raw_k=raw_k)[0][:, :, own_q]
        found = after.attend(q[:, :, own_q], k[:, :, own], v[:, :, own], raw_k=raw_k[:, :, own])[0]
        assert_close(found, expected, f"layer {layer}")


@torch.no_grad()
def test_heads_that_become_linear_again_start_as_after_conversion():
    model = tiny_model(layer_types=["full_attention"] * 2)
    fresh = with_memories(model, layer_types="linear_attention")
    again = with_memories(with_memories(fresh, full_heads=[[0, 1], [1]]), full_heads=[[], []])
    for name, expected in fresh.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], expected), name
    ids = random_ids(2, 50)
    assert torch.equal(again(ids).logits, fresh(ids).logits)
    everything = with_memories(fresh, full_heads=[[0, 1]] * 2)
    assert_close(everything(ids).logits, model(ids).logits, "all heads kept", tolerance=1e-6)


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
@torch.no_grad()
def test_checkpoint_on_disk_is_the_model_in_memory(tmp_path, make_source, shards):
    source, _ = make_source("llama", num_key_value_heads=2, dtype=torch.bfloat16, max_shard_size=shards)
    converted = convert_model(source, tmp_path / "converted", progress=False, attention_window=4, attention_sinks=2)
    student, _ = load_source(converted)
    model = with_memories(student, full_heads=[[1], [0, 1]], attention_memory=[[5, 0], [0, 0]], memory_score="learned")
    with torch.no_grad():
        model.model.layers[0].self_attn.memory_score.w_2.normal_()
    (folder := tmp_path / "memories").mkdir()
    write_with_memories(converted, folder, model)
    write_provenance(folder, read_provenance(converted))
    loaded, _ = load_source(folder)  # which refuses missing and unexpected weights
    assert loaded.config.full_heads == [[1], [0, 1]] and loaded.config.attention_memory == [[5, 0], [0, 0]]
    ids = random_ids(2, 60, vocab_size=300)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    stored = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored |= {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert stored["model.layers.0.self_attn.q_proj.weight"] == torch.bfloat16
    assert not any("layers.1.self_attn.feature_map" in name for name in stored)
    again = DiJiangForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_layers_made_softmax_again_leave_nothing_of_the_linear_ones_on_disk(tmp_path, make_source):
    source, teacher = make_source("llama", num_key_value_heads=4)
    converted = convert_model(source, tmp_path / "converted", "paper", progress=False)
    model = with_memories(
        load_source(converted)[0], layer_types="full_attention", **{"output_norm": "none", "output_gate": False}
    )
    (folder := tmp_path / "softmax").mkdir()
    write_with_memories(converted, folder, model)
    write_provenance(folder, read_provenance(converted))
    ids = random_ids(2, 30, vocab_size=300)
    assert_close(load_source(folder)[0](ids).logits, teacher(ids).logits, "logits", tolerance=1e-5)


def test_values_that_are_not_finite_are_refused(tmp_path, pair):
    student, _ = load_source(pair.checkpoint)
    model = with_memories(student, attention_memory=4, memory_score="learned")
    with torch.no_grad():
        model.model.layers[0].self_attn.memory_score.w_2.fill_(torch.nan)
    (folder := tmp_path / "memories").mkdir()
    with pytest.raises(ValueError, match=r"memory_score\.w_2 is not finite"):
        write_with_memories(pair.checkpoint, folder, model)

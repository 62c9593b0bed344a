"""A decoder of which one layer is in memory: it computes what transformers' own model does, or is refused in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from dijiang.checkpoint.source import open_source
from dijiang.checkpoint.weights import open_weights
from dijiang.compress.streamed_decoder import StreamedDecoder
from dijiang.convert import convert_model

WEIGHTS = "model.safetensors"
SIZES = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 1}
GATED = SIZES | {"intermediate_size": 48, "max_position_embeddings": 64, "num_key_value_heads": 2}
OPT = SIZES | {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
GPTJ = {"vocab_size": 320, "n_embd": 32, "n_head": 4, "n_positions": 64, "rotary_dim": 8}
BART = {"vocab_size": 320, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
BART |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
FAMILIES = {
    "llama": ("llama", GATED),
    "llama tied, biases": ("llama", GATED | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "gpt_neox": ("gpt_neox", GATED | {"rotary_pct": 0.25}),
    "gpt_neox tied, one layer": ("gpt_neox", GATED | {"tie_word_embeddings": True, "num_hidden_layers": 1}),
    "mistral, short window": ("mistral", GATED | {"sliding_window": 6}),
    "qwen2": ("qwen2", GATED),
    "qwen2 tied, one short window": (
        "qwen2",
        GATED | {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "opt": ("opt", OPT),
    "opt, narrow embeddings": ("opt", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gemma2, two masks": ("gemma2", GATED | {"head_dim": 8, "sliding_window": 6}),
    "phi3, fused": ("phi3", GATED),
    "gptj, layers give tuples": ("gptj", GPTJ | {"n_layer": 2}),
    "gptj, one layer": ("gptj", GPTJ | {"n_layer": 1}),
    "bloom, one layer": ("bloom", {"vocab_size": 320, "hidden_size": 32, "n_layer": 1, "n_head": 4}),
}


def perturb(model, seed=0):
    """Random values everywhere, biases and norms included, so that no two tensors could be swapped unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            embedding = "embed" in name or "wte" in name
            scale = 0.3 if parameter.dim() < 2 else 1.0 if embedding else 2 * parameter.shape[-1] ** -0.5
            parameter.copy_(scale * noise + (parameter if parameter.dim() < 2 else 0))
    return model.eval()


@pytest.fixture
def save(tmp_path):
    """save("llama", GATED, kind=AutoModelForCausalLM, dtype=..., **options of save_pretrained) -> the model's folder."""

    def write(family, settings, *, kind=AutoModelForCausalLM, dtype=torch.float32, **options):
        config = AutoConfig.for_model(family, **settings)
        perturb(kind.from_config(config)).to(dtype).save_pretrained(tmp_path / "source", **options)
        return tmp_path / "source"

    return write


def opened(folder) -> StreamedDecoder:
    source = open_source(folder)
    return StreamedDecoder(source.config, open_weights(source), "it")


@torch.no_grad()
def streamed(decoder, ids):
    """What the last layer gives, layer by layer; no other layer may be in memory meanwhile."""
    hidden = decoder.embed(ids)
    for index in range(len(decoder.layers)):
        with decoder.layer(index) as layer:
            held = [{p.is_meta for p in other.parameters()} for other in decoder.layers]
            assert held == [{i != index} for i in range(len(held))]
            hidden = decoder.run(layer, index, hidden)
    assert all(p.is_meta for p in decoder.layers.parameters())
    return hidden


def assert_same(folder, ids):
    """Streamed logits and losses are those of the model that transformers loads from `folder`."""
    model, decoder = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), opened(folder)
    with torch.no_grad():
        reference = model(ids).logits
        losses = [model(row[None], labels=row[None]).loss * (len(row) - 1) for row in ids]
    hidden = streamed(decoder, ids)
    assert reference.std() > 0.3
    torch.testing.assert_close(decoder.logits(hidden), reference, rtol=0, atol=1e-5 * reference.std().item())
    torch.testing.assert_close(decoder.losses(hidden, ids), torch.stack(losses), rtol=1e-5, atol=0)
    assert decoder.n_parameters == model.num_parameters()
    return model, decoder


# --- the same as transformers' ---


@pytest.mark.parametrize("name", FAMILIES)
def test_families(save, tokens, name):
    folder = save(*FAMILIES[name])
    model, decoder = assert_same(folder, tokens(20))
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith(decoder.prefix)}
    assert {n for layer in decoder.targets for n in layer} == linears and len(linears) % len(decoder.layers) == 0


def test_dijiang(pair, tmp_path, tokens):
    _, decoder = assert_same(pair.checkpoint, tokens(20))
    names = {name.split(".", 3)[3] for layer in decoder.targets for name in layer}
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    assert names == {f"self_attn.{x}" for x in attention} | {f"mlp.{x}" for x in mlp}
    convert_model(
        pair.teacher, tmp_path / "hybrid", progress=False, dtype="bfloat16",
        layer_types=["full_attention", "linear_attention"], attention_window=4, attention_sinks=2, branch_scale_init=0.5,
    )  # fmt: skip
    assert_same(tmp_path / "hybrid", tokens(20))


def test_sequences_of_two_lengths(save, tokens):
    folder = save("mistral", GATED | {"sliding_window": 6})
    model, decoder = AutoModelForCausalLM.from_pretrained(folder).eval(), opened(folder)
    long, short = tokens(20), tokens(9, rows=3)
    states = [decoder.embed(long), decoder.embed(short)]
    for index in range(2):
        with torch.no_grad(), decoder.layer(index) as layer:
            states = [decoder.run(layer, index, hidden) for hidden in states]
    for hidden, ids in zip(states, (long, short), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(decoder.logits(hidden), model(ids).logits, rtol=0, atol=1e-5)


# --- how it is stored ---


def test_shards(save, tokens):
    folder = save("llama", GATED, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same(folder, tokens(20))


def test_bfloat16(save, tokens):
    _, decoder = assert_same(save("llama", GATED, dtype=torch.bfloat16), tokens(20))
    assert decoder.stored_dtype("model.layers.1.mlp.up_proj.weight") == torch.bfloat16
    assert decoder.model.lm_head.weight.dtype == torch.float32


def test_bin(save, tokens):
    folder = save("llama", GATED | {"tie_word_embeddings": True})
    torch.save(AutoModelForCausalLM.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert_same(folder, tokens(20))


def test_a_head_that_differs_though_the_config_ties_it(save, tokens):
    folder = save("llama", GATED)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model, _ = assert_same(folder, tokens(20))
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_tied_head_that_is_stored_too(save, tokens):
    folder = save("llama", GATED | {"tie_word_embeddings": True})
    weights = load_file(folder / WEIGHTS)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    _, decoder = assert_same(folder, tokens(20))
    assert decoder.model.lm_head.weight is decoder.model.model.embed_tokens.weight


@pytest.mark.parametrize(("family", "settings"), [("opt", OPT), ("qwen2", GATED | {"tie_word_embeddings": True})])
def test_a_model_saved_without_its_head(save, tokens, family, settings):
    folder = save(family, settings, kind=AutoModel)
    assert not any(name.startswith("model.") for name in load_file(folder / WEIGHTS))
    assert_same(folder, tokens(20))


def test_an_old_gpt_neox_with_tables_in_its_files(save, tokens):
    folder = save("gpt_neox", GATED)
    weights = load_file(folder / WEIGHTS)
    assert "embed_out.weight" in weights  # transformers' model has another name for it
    weights["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
    weights["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    model, decoder = AutoModelForCausalLM.from_pretrained(folder).eval(), opened(folder)
    with torch.no_grad():
        logits = decoder.logits(streamed(decoder, tokens(20)))
        torch.testing.assert_close(logits, model(tokens(20)).logits, rtol=0, atol=1e-5)


# --- refusals ---


@pytest.mark.parametrize(
    ("family", "settings", "kind", "message"),
    [
        ("gpt2", {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 320}, None, r"c_attn is a Conv1D, .*transposed"),
        ("mixtral", GATED | {"num_local_experts": 4}, None, "is a Mixtral.*only nn.Linear layers can"),
        ("qwen2_moe", GATED | {"num_experts": 4, "moe_intermediate_size": 16}, None, "is a Qwen2Moe.*only nn.Linear layers"),
        ("mamba", {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2}, None, "which cannot be pruned"),
        ("bert", GATED, AutoModelForMaskedLM, "it is a BertForMaskedLM, not a causal language model; only plain decoders"),
        ("bart", BART, AutoModelForSeq2SeqLM, "it is a BartForConditionalGeneration, not a causal language model"),
        ("t5", {"vocab_size": 320, "d_model": 32, "d_ff": 48, "num_layers": 2}, AutoModelForSeq2SeqLM, "it is a T5ForCond"),
    ],
)
def test_architectures_that_will_not_do(refused, save, family, settings, kind, message):
    folder = save(family, settings, kind=kind or AutoModelForCausalLM)
    refused(folder, lambda: opened(folder), message)


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGES = {
    "it lacks 1 tensors of its architecture, such as lm_head.weight; load it with": lambda w: w.pop("lm_head.weight"),
    "it lacks 9 tensors .* such as model.layers.1.": lambda w: [w.pop(name) for name in list(w) if ".layers.1." in name],
    rf"it: {UP} has shape \(32, 48\), its config says \(48, 32\)": lambda w: w.update({UP: w[UP].T.contiguous()}),
    f"{UP} is not a float tensor, so the model is quantized": lambda w: w.update({UP: w[UP].to(torch.float8_e4m3fn)}),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_weights_that_will_not_do(refused, save, message):
    folder = save("llama", GATED)
    weights = load_file(folder / WEIGHTS)
    DAMAGES[message](weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    refused(folder, lambda: opened(folder), message)

"""The pairs of models: what they are, and what is refused."""

import pytest
import torch
from dijiang_testing.latency import CPU, HEAD_DIM, HEADS, KEY_VALUE_HEADS, TINY, checkpoint_pair, shape_pair
from transformers import AutoConfig

from dijiang.checkpoint import shapes
from dijiang.convert import convert_model, load_source
from dijiang.evaluate.latency import measure, models
from dijiang.modeling import DiJiangForCausalLM


@pytest.mark.parametrize("shape", TINY)
def test_a_shape_is_transformers_model_and_the_kernels(shape):
    pair = shape_pair(shape, longest=100, dtype="bfloat16", device="cpu", settings={"attention_window": 16})
    ours, theirs = pair.dijiang, pair.softmax
    assert type(theirs).__module__.startswith("transformers.models.") and theirs.config._attn_implementation == "sdpa"
    assert ours.config.layer_types == ["linear_attention"] * 3 and ours.config.attention_window == 16
    kernels = {name: p for name, p in ours.named_parameters() if p.dtype == torch.float32}
    heads = HEADS + KEY_VALUE_HEADS[shape]
    assert sum(p.numel() for p in kernels.values()) == 3 * heads * (3 * HEAD_DIM + HEAD_DIM + 1)
    assert ours.num_parameters() == theirs.num_parameters() + sum(p.numel() for p in kernels.values())
    assert all(p.dtype == torch.bfloat16 for name, p in ours.named_parameters() if name not in kernels)
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    biases = [p for name, p in kernels.items() if name.endswith("branch_scale.bias")]
    assert len(biases) == 3 and not any(p.any() for p in biases)  # a scale of 1
    assert not ours.training and not theirs.training
    assert (
        theirs.config.max_position_embeddings
        == ours.config.max_position_embeddings
        == max(101, AutoConfig.for_model(**TINY[shape]).max_position_embeddings)
    )
    assert pair.facts["max_position_embeddings"] == ours.config.max_position_embeddings


def test_known_shapes():
    pythias = [f"pythia-{size}" for size in ("70m", "160m", "410m", "1b", "1.4b", "2.8b")]
    assert set(shapes.SHORT_NAMES) - set(TINY) == {*pythias, "smollm2-135m", "tinyllama-1.1b", "llama2-7b"}
    assert set(measure.PAPER_SPEEDS) < set(pythias)
    assert shapes.shape_config("tinyllama-1.1b").num_key_value_heads == 4


def test_a_checkpoint_and_its_teacher_are_loaded_as_they_are(pair, make_source, tmp_path, tokens):
    folder, theirs = make_source("gpt_neox", name="teacher", tie_word_embeddings=False)
    checkpoint = convert_model(folder, tmp_path / "checkpoint", progress=False)
    loaded = checkpoint_pair(checkpoint, folder, longest=64, **CPU)
    ids = tokens(20)
    assert type(loaded.softmax) is type(theirs) and isinstance(loaded.dijiang, DiJiangForCausalLM)
    with torch.no_grad():
        assert torch.equal(loaded.softmax(ids).logits, theirs(ids).logits)
        assert torch.equal(loaded.dijiang(ids).logits, load_source(checkpoint)[0](ids).logits)
    assert loaded.name == "checkpoint" and loaded.facts["teacher"] == "teacher"


def test_a_gguf_file_gives_dense_weights(tmp_path, monkeypatch):
    arguments = {}
    monkeypatch.setattr(
        models.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: arguments.update(k) or torch.nn.Module()
    )
    source = models.Source(name="x", folder=tmp_path, gguf=tmp_path / "x.gguf", config=None, commit=None)
    models.load_softmax(source, torch.bfloat16)
    assert arguments["gguf_file"] == "x.gguf" and arguments["dtype"] == torch.bfloat16
    assert models.GgufConfig is None or arguments["quantization_config"].dequantize


def test_what_cannot_be_compared_is_refused(pair, make_source, tmp_path, refused, monkeypatch):
    wide, _ = make_source(num_key_value_heads=2, intermediate_size=64, name="wide")
    grouped, _ = make_source(num_key_value_heads=4, name="grouped")
    sliding, _ = make_source("mistral", num_key_value_heads=2, sliding_window=8, name="sliding")
    student, teacher = pair.checkpoint, pair.teacher
    cases = [
        (
            lambda: checkpoint_pair(teacher, teacher, longest=9, **CPU),
            "is a llama model; give a checkpoint with linear layers",
        ),
        (lambda: checkpoint_pair(student, student, longest=9, **CPU), "the teacher .* is a DiJiang model; give the softmax"),
        (lambda: checkpoint_pair(student, wide, longest=9, **CPU), "has intermediate_size=48, .*wide has 64; give the model"),
        (lambda: checkpoint_pair(student, grouped, longest=9, **CPU), "has num_key_value_heads=2, .*grouped has 4; give"),
        (lambda: checkpoint_pair(student, sliding, longest=9, **CPU), "its last sliding_window=8 tokens only"),
        (lambda: checkpoint_pair(student, teacher, longest=65, **CPU), "of 65 tokens is more than the 64 positions"),
        (lambda: shape_pair("pythia-3b", longest=9, **CPU), "shape 'pythia-3b' is unknown .*choose from .*pythia-2.8b"),
        (lambda: shape_pair("llama", longest=9, preset="best", **CPU), "preset 'best' is unknown; choose from recommended"),
        (lambda: shape_pair("llama", longest=9, settings={"windows": 3}, **CPU), "unknown setting 'windows'"),
        (lambda: shape_pair("llama", longest=9, settings={"decay_spans": [4, 8]}, **CPU), "decay_spans has no effect"),
        (lambda: shape_pair("llama", longest=9, device="tpu"), "device 'tpu' is unknown .*choose from auto, cpu, cuda"),
        (lambda: shape_pair("llama", longest=9, device="cpu", dtype="int8"), "dtype 'int8' is unknown"),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cases.append((lambda: shape_pair("llama", longest=9, device="cuda"), "torch finds no GPU; choose cpu"))
    for call, message in cases:
        refused(tmp_path, call, message)


def test_weights_that_do_not_fit_are_refused(pair, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(models, "available_bytes", lambda device: 2 << 30)
    message = r"^the weights of \S+ and of its peer do not fit: about 2\.0 GiB are needed and 2\.0 are free; choose a smaller"
    refused(tmp_path, lambda: shape_pair("llama", longest=9, **CPU), message)
    refused(tmp_path, lambda: checkpoint_pair(pair.checkpoint, pair.teacher, longest=9, **CPU), message)

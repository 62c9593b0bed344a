"""What cannot be converted is refused in one clear line, and nothing is left on disk."""

import json
import os
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from dijiang.common.outputs import new_folder
from dijiang.convert import convert_model, load_source, parse_overrides

WEIGHTS = "model.safetensors"


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, edit):
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def rename(weights, old, new):
    weights[new] = weights.pop(old)


def poison(weights, name, value):
    weights[name].view(-1)[7] = value


def drop_layer(weights):
    for name in [name for name in weights if name.startswith("model.layers.1.")]:
        del weights[name]


def add_entries(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new{i}>" for i in range(325 - len(tokenizer))])
    tokenizer.save_pretrained(folder)


def cut(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def pickle_weights(folder, content):
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / "pytorch_model.bin")


def remove(folder, *names):
    for name in names:
        (folder / name).unlink()


Q = "model.layers.0.self_attn.q_proj.weight"
# what is done to a sound LLaMA source, and what the refusal says
BROKEN = {
    "unknown architecture": (lambda f: edit_config(f, model_type="gpt2"), r"'gpt2'.*gpt_neox, llama, mistral"),
    "no model_type": (lambda f: (f / "config.json").write_text("{}"), r"model_type None.*llama"),
    "no config": (lambda f: remove(f, "config.json"), r"no config\.json"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{,"), r"config\.json is not valid JSON"),
    "config of wrong types": (lambda f: edit_config(f, hidden_size="wide"), r"config\.json cannot be read.*hidden_size"),
    "unknown activation": (lambda f: edit_config(f, hidden_act="zelu"), r"makes no model.*zelu"),
    "no weights": (lambda f: remove(f, WEIGHTS), r"holds no weights.*model\.safetensors"),
    "cut weights": (lambda f: cut(f / WEIGHTS, 0.6), r"model\.safetensors is corrupt or cut short"),
    "cut header": (lambda f: cut(f / WEIGHTS, 0.01), r"model\.safetensors is corrupt or cut short"),
    "garbage weights": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 999), r"model\.safetensors is corrupt or cut short"),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), r"model\.safetensors is corrupt or cut short"),
    "one missing": (lambda f: edit_weights(f, lambda w: w.pop(Q)), rf"lacks 1 tensor: {Q}; the files are incomplete"),
    "many missing": (lambda f: edit_weights(f, drop_layer), r"lacks 9 tensors: (model\.layers\.1\.[\w.]+, ){3}\.\.\.;"),
    "unexpected": (
        lambda f: edit_weights(f, lambda w: w.update(extra=torch.ones(1))),
        r"holds unexpected 1 tensor: extra;",
    ),
    "kernel names in a source": (
        lambda f: edit_weights(f, lambda w: w.update({"model.layers.0.self_attn.feature_map_q.T": torch.ones(4, 8)})),
        r"holds unexpected 1 tensor: model.layers.0.self_attn.feature_map_q.T;",
    ),
    "renamed": (lambda f: edit_weights(f, lambda w: rename(w, Q, "model.q")), rf"lacks 1 tensor: {Q}"),
    "wrong shape": (
        lambda f: edit_weights(f, lambda w: w.update({Q: torch.ones(32, 31)})),
        rf"holds 1 tensor of a wrong shape: {Q} \[32, 31\], expected \[32, 32\]",
    ),
    "NaN": (lambda f: edit_weights(f, lambda w: poison(w, Q, float("nan"))), rf"{Q} in model\.safetensors holds NaN or inf"),
    "infinity": (lambda f: edit_weights(f, lambda w: poison(w, Q, float("inf"))), rf"{Q} in model\.safetensors holds NaN or"),
    "no tokenizer": (lambda f: remove(f, "tokenizer.json", "tokenizer_config.json"), r"has no tokenizer"),
    "broken tokenizer": (lambda f: cut(f / "tokenizer.json", 0.5), r"tokenizer of .* cannot be read"),
    "too many entries": (add_entries, r"325 entries.*320 embedding rows"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), r"adapter \(adapter_config\.json\); merge it"),
    "quantized config": (
        lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"is quantized \(gptq\)",
    ),
    "integer weights": (
        lambda f: edit_weights(f, lambda w: w.update({Q: w[Q].to(torch.int8)})),
        rf"{Q} is not a float tensor, so the source is quantized",
    ),
    "8-bit floats": (
        lambda f: edit_weights(f, lambda w: w.update({Q: w[Q].to(torch.float8_e4m3fn)})),
        rf"{Q} is not a float tensor, so the source is quantized",
    ),
    "shard missing": (
        lambda f: (
            (f / WEIGHTS).rename(f / "x.safetensors"),
            (f / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}'),
        ),
        r"lacks y\.safetensors, which model\.safetensors\.index\.json names",
    ),
    "index without map": (
        lambda f: ((f / WEIGHTS).rename(f / "x"), (f / f"{WEIGHTS}.index.json").write_text("{}")),
        r"index\.json has no weight_map",
    ),
    "tensor twice": (
        lambda f: (
            save_file(load_file(f / WEIGHTS), f / "x.safetensors"),
            (f / WEIGHTS).rename(f / "y.safetensors"),
            (f / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}'),
        ),
        r"holds [\w.]+ twice, once as [\w.]+ in y\.safetensors",
    ),
    "pickle with code": (lambda f: pickle_weights(f, {"a": sys.exit}), r"pytorch_model\.bin holds more than tensors"),
    "pickle of something else": (lambda f: pickle_weights(f, [1, 2]), r"is not a dictionary of tensors"),
    "garbage pickle": (
        lambda f: (remove(f, WEIGHTS), (f / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(999))),
        r"pytorch_model\.bin is corrupt or cut short",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_source(make_source, tmp_path, case, refused):
    source, _ = make_source()
    breaks, message = BROKEN[case]
    breaks(source)
    refused(tmp_path, lambda: convert_model(source, tmp_path / "new" / "out", progress=False), message)
    refused(tmp_path, lambda: load_source(source), message)


def test_gpt_neox_matrix_that_cannot_be_split(make_source, tmp_path, refused):
    source, _ = make_source("gpt_neox")
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    edit_weights(source, lambda w: w.update({name: torch.ones(95, 32)}))
    message = rf"{name} has shape \(95, 32\), which does not fit its config"
    refused(tmp_path, lambda: convert_model(source, tmp_path / "out", progress=False), message)


def test_overflow_in_the_wanted_dtype(make_source, tmp_path, refused):
    source, _ = make_source()
    edit_weights(source, lambda w: poison(w, Q, 1e5))
    message = rf"{Q} overflows torch\.float16; choose bfloat16"
    refused(tmp_path, lambda: convert_model(source, tmp_path / "out", dtype="float16", progress=False), message)
    convert_model(source, tmp_path / "out", dtype="bfloat16", progress=False)


def test_no_such_source(tmp_path, monkeypatch, refused):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(tmp_path, lambda: convert_model(tmp_path / "none", tmp_path / "out"), r"none is neither a folder.*nor a hub id")
    refused(tmp_path, lambda: convert_model("nobody/nothing", tmp_path / "out"), r"nobody/nothing is neither.*offline")


def test_file_that_is_no_gguf(make_source, tmp_path, refused):
    source, _ = make_source()
    refused(tmp_path, lambda: convert_model(source / "config.json", tmp_path / "out"), r"is a file, but not a GGUF file")


def test_broken_gguf(tmp_path, refused):
    pytest.importorskip("gguf")
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 5, 5) + b"\x01" * 40)
    refused(tmp_path, lambda: convert_model(path, tmp_path / "out"), r"x\.gguf cannot be read")


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_gguf_without_a_package_it_needs(tmp_path, monkeypatch, refused, package):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"^reading x\.gguf needs {package}; run: pip install {package}$"
    refused(tmp_path, lambda: convert_model(tmp_path / "x.gguf", tmp_path / "out"), message)


def test_dijiang_checkpoint_as_source(make_source, tmp_path, refused):
    source, _ = make_source()
    convert_model(source, tmp_path / "out", progress=False)
    refused(tmp_path, lambda: convert_model(tmp_path / "out", tmp_path / "out2"), r"is a DiJiang checkpoint already")
    edit_weights(tmp_path / "out", lambda w: w.pop("model.layers.1.self_attn.feature_map_q.T"))
    refused(tmp_path, lambda: load_source(tmp_path / "out"), r"1 missing keys, such as model\.layers\.1.*feature_map_q\.T")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "best"}, r"preset 'best' is unknown; choose from recommended, linear, paper"),
        ({"dtype": "int8"}, r"dtype 'int8' is unknown; choose from auto, float32"),
        (
            {"feature_mapp": "wdcf"},
            r"unknown setting 'feature_mapp' \(did you mean feature_map\?\); these can be set: .*decay",
        ),
        ({"xyz": 1}, r"unknown setting 'xyz'; these can be set"),
        ({"hidden_size": 64}, r"hidden_size is given by the source model"),
        ({"vocab_size": 64}, r"vocab_size is given by the source model"),
        ({"rope_parameters": {}}, r"rope_parameters is given by the source model"),
        ({"feature_map": "wdfc"}, r"feature_map='wdfc' is unknown; choose one of wdcf"),
        ({"attention_window": "wide"}, r"attention_window"),
        ({"attention_window": 0}, r"attention_sinks=4 needs attention_window"),
        ({"layer_types": "linear"}, r"layer_types holds linear"),
        ({"layer_types": ["linear_attention"]}, r"layer_types"),
        ({"layer_types": "sliding_attention"}, r"sliding_attention needs sliding_window of at least 1, not None"),
    ],
)
def test_settings(make_source, tmp_path, settings, message, refused):
    source, _ = make_source()
    refused(tmp_path, lambda: convert_model(source, tmp_path / "out", **settings), message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["decay"], r"'decay' is not KEY=VALUE"),
        (["=3"], r"'=3' is not KEY=VALUE"),
        (["decay=[a"], r"not valid YAML"),
        (["decay=none", "decay=retnet"], r"decay is set twice"),
        (["dekay=none"], r"unknown setting 'dekay' \(did you mean decay\?\)"),
    ],
)
def test_parse_overrides_refuses(words, message):
    with pytest.raises(ValueError, match=message):
        parse_overrides(words)


def test_output_that_is_taken(make_source, tmp_path, refused):
    source, _ = make_source()
    refused(tmp_path, lambda: convert_model(source, source), r"output folder .* is not empty")
    refused(tmp_path, lambda: convert_model(source, source / "config.json"), r"is a file; choose a new folder")
    refused(tmp_path, lambda: convert_model(source, source / "config.json" / "out"), r"cannot write to .*config\.json")


def test_new_folder_appears_whole(tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.mkdir()
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "empty", tmp_path / "a" / "b" / "c", str(tmp_path / "d")):
        with new_folder(output) as folder:
            (folder / "x").write_text("1")
            assert folder.parent == Path(output).parent and not (Path(output) / "x").exists()
        assert [path.name for path in Path(output).iterdir()] == ["x"]
        assert Path(output).stat().st_mode == ordinary.stat().st_mode
    assert list(tmp_path.rglob("*.partial")) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_are_for_those_whom_the_folder_is_for(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "out") as folder:
            (folder / "figures").mkdir()
            save_file({"x": torch.ones(1)}, folder / "figures" / "x.safetensors")
            (folder / "run.sh").touch(0o700)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == {"x.safetensors": mode, "run.sh": 0o700 | mode}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
def test_new_folder_leaves_nothing_on_any_exception(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "a" / "b") as folder:  # noqa: PT012
        (folder / "x").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_new_folder_does_not_overwrite_what_came_meanwhile(tmp_path):
    with pytest.raises(ValueError, match="is not empty"), new_folder(tmp_path / "out"):  # noqa: PT012
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("1")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_interrupted_conversion(make_source, tmp_path, monkeypatch):
    source, _ = make_source()
    before = sorted(tmp_path.rglob("*"))

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("dijiang.convert.converter.copy_code", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_model(source, tmp_path / "out", progress=False)
    assert sorted(tmp_path.rglob("*")) == before


IDENTITY = {"feature_map": "identity", "normalize": False, "attention_window": 0, "attention_sinks": 0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_map": "elu", "feature_dim": 8}, "feature_dim has no effect with feature_map=elu"),
        ({"feature_map": "relu", "feature_pairs": False}, "feature_pairs has no effect with feature_map=relu"),
        ({"feature_map": "cosformer", "feature_seed": 1}, "feature_seed has no effect with feature_map=cosformer"),
        ({**IDENTITY, "feature_activation": "exp"}, "feature_activation has no effect with feature_map=identity"),
        ({**IDENTITY, "branch_scale_init": 1.0}, "branch_scale_init has no effect with attention_window=0"),
        ({"feature_map": "hedgehog", "radial": "chi"}, "radial has no effect with feature_map=hedgehog"),
        ({"feature_map": "pff", "dct_direction": "inverse"}, "dct_direction has no effect with feature_map=pff"),
        ({"attention_window": 0, "attention_sinks": 0, "branch_scale_init": 1.0}, "no effect with attention_window=0"),
        ({"layer_types": "full_attention", "decay": "retnet"}, "decay has no effect with no linear layer"),
        ({"decay_spans": [4, 64]}, "decay_spans has no effect with decay=none"),
        ({"sliding_window": 9}, "sliding_window has no effect with no sliding_attention layer"),
    ],
    ids=str,
)
def test_settings_without_effect(make_source, tmp_path, refused, settings, message):
    source, _ = make_source()
    refused(tmp_path, lambda: convert_model(source, tmp_path / "out", **settings), message)


@pytest.mark.parametrize("settings", [{}, {"attention_window": 0, "attention_sinks": 0}], ids=str)
def test_identity_with_a_denominator(make_source, tmp_path, refused, settings):
    source, _ = make_source()
    cures = "set normalize=false attention_window=0 attention_sinks=0, or state_update=delta"
    message = f"^feature_map=identity has negative features, .* {cures}$"
    refused(tmp_path, lambda: convert_model(source, tmp_path / "out", feature_map="identity", **settings), message)


def test_unknown_rope_type(make_source, tmp_path, refused):
    source, _ = make_source()
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "magic", "rope_theta": 1.0}
    (source / "config.json").write_text(json.dumps(config))
    refused(tmp_path, lambda: convert_model(source, tmp_path / "out"), "magic")


@pytest.mark.parametrize("output", ["", "."])
def test_the_current_folder_is_no_output(make_source, tmp_path, monkeypatch, refused, output):
    source, _ = make_source()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(tmp_path, lambda: convert_model(source, output), "must be a new folder")

"""What a conversion leaves in its folder: kernel parameters, dtypes, tokenizer, code and provenance."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import dijiang.modeling
from dijiang.checkpoint.provenance import add_stage, read_provenance, write_provenance
from dijiang.convert import PRESETS, convert_model, load_source, parse_overrides
from dijiang.convert.layer_settings import OVERRIDABLE
from dijiang.modeling import FEATURE_MAPS, DiJiangForCausalLM

# parts of a linear layer that its source's attention has not
NEW_PARTS = {
    "recommended": {"feature_map_q", "feature_map_k", "key_scale", "branch_scale"},
    "linear": {"feature_map_q", "feature_map_k", "key_scale", "branch_scale", "decay"},
    "paper": {"feature_map_q", "feature_map_k", "decay", "output_norm", "output_gate"},
}


def new_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name: x for name, x in tensors.items() if ".self_attn." in name and "_proj." not in name}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_presets_load_with_fresh_kernel_parameters(make_source, tokens, tmp_path, family, preset):
    source, model = make_source(family)
    out = convert_model(source, tmp_path / "out", preset, progress=False, feature_seed=3)
    torch.manual_seed(99)  # the checkpoint must not depend on the global generator
    again = convert_model(source, tmp_path / "again", preset, progress=False, feature_seed=3)
    assert isinstance(out, Path) and out == tmp_path / "out"

    stored = new_tensors(out)
    assert {name.split(".")[4] for name in stored} == NEW_PARTS[preset]
    assert all(torch.equal(tensor, new_tensors(again)[name]) for name, tensor in stored.items())

    converted, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(getattr(converted.config, key) == value for key, value in PRESETS[preset].items())
    fresh = DiJiangForCausalLM(converted.config)
    for name, tensor in stored.items():
        assert torch.equal(converted.get_parameter(name), tensor)
        if "output_gate" not in name:  # the one part that is drawn at random
            assert torch.equal(fresh.get_parameter(name), tensor), name
    buffers = dict(converted.named_buffers())
    fixed_directions = PRESETS[preset]["feature_map"] == "wdcf"
    assert any(name.endswith("feature_map_k.C") for name in buffers) == fixed_directions
    assert all(torch.equal(buffers[name], buffer) for name, buffer in fresh.named_buffers())
    with torch.no_grad():
        assert torch.isfinite(converted(tokens(100)).logits).all()
        # the new layers act: this is no longer the source
        assert (converted(tokens(100)).logits - model(tokens(100)).logits).abs().max() > 0.1


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_every_map_converts_loads_and_runs(make_source, tokens, tmp_path, feature_map, preset):
    source, _ = make_source()
    words = [f"feature_map={feature_map}"]
    if not FEATURE_MAPS[feature_map].positive:
        words += ["normalize=false", "attention_window=0", "attention_sinks=0"]
    out = convert_model(source, tmp_path / "out", preset, progress=False, **parse_overrides(words))
    converted, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert converted.config.feature_map == feature_map
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.isfinite(converted(tokens(100)).logits).all()


def test_output_gate_starts_as_in_the_paper(make_source, tmp_path):
    source, _ = make_source(hidden_size=128, num_attention_heads=4)
    convert_model(source, tmp_path / "out", "paper", progress=False)
    gates = [tensor for name, tensor in new_tensors(tmp_path / "out").items() if "output_gate" in name]
    bound = 2**-2.5 * (6 / 256) ** 0.5  # of xavier_uniform
    assert not torch.equal(*gates)
    assert all(0.98 * bound < gate.abs().max() <= bound for gate in gates)


def test_presets_speak_of_the_same_settings():
    assert PRESETS["recommended"].keys() == PRESETS["paper"].keys() <= set(OVERRIDABLE)
    assert PRESETS["linear"].keys() == PRESETS["paper"].keys() | {"decay_spans"} <= set(OVERRIDABLE)


@pytest.mark.parametrize("wanted", ["auto", "bfloat16", "float16", "float32"])
def test_dtypes(make_source, tmp_path, wanted):
    source, _ = make_source(dtype=torch.bfloat16)
    convert_model(source, tmp_path / "out", "paper", dtype=wanted, progress=False)
    expected = torch.bfloat16 if wanted == "auto" else getattr(torch, wanted)
    tensors = load_file(tmp_path / "out/model.safetensors")
    new = new_tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in new.values()} == {torch.float32}
    assert {tensor.dtype for name, tensor in tensors.items() if name not in new} == {expected}
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == expected


def test_kernel_parameters_stay_float32_in_a_half_precision_model(make_source, tmp_path):
    source, _ = make_source(dtype=torch.bfloat16)
    convert_model(source, tmp_path / "out", progress=False, decay="learned")
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        load_source(tmp_path / "out", dtype=torch.bfloat16)[0],
        load_source(source, dtype="auto", layer_types="linear_attention", decay="learned")[0],
    ):
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        new = new_tensors(tmp_path / "out").keys()
        assert {dtypes[name] for name in new} == {torch.float32}
        assert {dtype for name, dtype in dtypes.items() if name not in new} == {torch.bfloat16}
        assert model.dtype == torch.bfloat16 and model.config.dtype == torch.bfloat16


def test_overrides_reach_the_config(make_source, tmp_path):
    source, _ = make_source()
    layers = ["full_attention", "linear_attention"]
    convert_model(source, tmp_path / "out", progress=False, layer_types=layers, attention_window=16, feature_map="hedgehog")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.layer_types, config.attention_window, config.feature_map) == (layers, 16, "hedgehog")
    assert {name.split(".")[2] for name in new_tensors(tmp_path / "out")} == {"1"}


def test_parse_overrides():
    words = ["decay=retnet", "attention_window=32", "normalize=false", "branch_scale_init=-1e4", "layer_types=[a, b]"]
    assert parse_overrides(words) == {
        "decay": "retnet",
        "attention_window": 32,
        "normalize": False,
        "branch_scale_init": -1e4,
        "layer_types": ["a", "b"],
    }
    assert parse_overrides([]) == {} and parse_overrides(["decay=none", "feature_dim=null"])["decay"] == "none"


def test_tokenizer_template_and_generation_config_are_kept(make_source, tokenizer, tmp_path):
    source, _ = make_source()
    convert_model(source, tmp_path / "out", progress=False)
    kept = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the cat sat on the mat, naïve 12"
    assert kept(text).input_ids == tokenizer(text).input_ids and kept.decode(kept(text).input_ids) == text
    assert kept.chat_template == tokenizer.chat_template and kept.eos_token == "</s>"
    assert GenerationConfig.from_pretrained(tmp_path / "out").pad_token_id == 3


def test_code_lies_beside_the_weights(make_source, tmp_path):
    source, _ = make_source()
    out = convert_model(source, tmp_path / "out", progress=False)
    room = Path(dijiang.modeling.__file__).parent
    expected = {path.name: path.read_bytes() for path in room.glob("*.py") if path.name != "__init__.py"}
    assert {path.name: path.read_bytes() for path in out.glob("*.py")} == expected
    auto_map = json.loads((out / "config.json").read_text())["auto_map"]
    assert auto_map.keys() >= {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"}
    assert all(f"class {name.split('.')[1]}(" in expected[name.split(".")[0] + ".py"].decode() for name in auto_map.values())


def test_provenance(make_source, tmp_path):
    source, _ = make_source()
    out = convert_model(str(source), tmp_path / "out", "paper", progress=False, feature_seed=7)
    record = read_provenance(out)
    assert (record["source"], record["preset"], record["overrides"], record["seed"]) == (
        "source",
        "paper",
        {"feature_seed": 7},
        7,
    )
    assert record["versions"].keys() == {"dijiang", "torch", "transformers", "python"}
    assert record["source_files"].keys() >= {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}
    for name, digest in record["source_files"].items():
        assert digest == hashlib.sha256((source / name).read_bytes()).hexdigest()
    for name, digest in record["code"].items():
        assert digest == hashlib.sha256((out / name).read_bytes()).hexdigest()
    assert [stage["stage"] for stage in record["stages"]] == ["convert"]

    write_provenance(out, add_stage(record, "align", tokens=123))
    assert [stage["stage"] for stage in record["stages"]] == ["convert"]
    assert [stage["stage"] for stage in read_provenance(out)["stages"]] == ["convert", "align"]
    assert read_provenance(out)["stages"][1]["tokens"] == 123 and not list(out.glob("*.partial"))


@pytest.mark.parametrize(
    ("content", "message"), [(None, "holds no prov"), ("{", "not valid JSON"), ("{}", "no list of stages")]
)
def test_provenance_that_is_not_ours(tmp_path, content, message):
    if content is not None:
        (tmp_path / "provenance.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_provenance(tmp_path)


def test_progress_goes_to_stderr_or_nowhere(make_source, tmp_path, capfd, monkeypatch):
    source, _ = make_source()
    capfd.readouterr()
    convert_model(source, tmp_path / "quiet", progress=False)
    assert capfd.readouterr() == ("", "")
    convert_model(source, tmp_path / "out")  # not a terminal: no bar either, so that an error is the only line
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    convert_model(source, tmp_path / "bar")
    out, err = capfd.readouterr()
    assert out == "" and "Converting" in err


def test_load_source_takes_a_dijiang_checkpoint_as_it_is(make_source, tokens, tokenizer, tmp_path):
    source, _ = make_source()
    convert_model(source, tmp_path / "out", progress=False, attention_window=16)
    loaded, own_tokenizer = load_source(tmp_path / "out")
    assert loaded.config.attention_window == 16 and set(loaded.config.layer_types) == {"linear_attention"}
    assert own_tokenizer.get_vocab() == tokenizer.get_vocab() and not loaded.training
    expected = DiJiangForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(tokens(50)).logits, expected(tokens(50)).logits)
    with pytest.raises(ValueError, match="decay cannot be set any more"):
        load_source(tmp_path / "out", decay="retnet")

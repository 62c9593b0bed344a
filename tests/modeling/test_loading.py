"""What is on disk is the whole model: weights, kernel parameters, code; with and without `dijiang` installed."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from dijiang_testing.model_checks import MAPS, random_ids, tiny_config, tiny_model
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import dijiang.modeling
from dijiang.modeling import DiJiangForCausalLM, DiJiangModel

SHIPPED = sorted(path for path in Path(dijiang.modeling.__file__).parent.glob("*.py") if path.name != "__init__.py")


def tensors_of(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def assert_same_tensors(loaded, expected):
    loaded, expected = tensors_of(loaded), tensors_of(expected)
    assert loaded.keys() == expected.keys()
    for name in expected:
        assert loaded[name].dtype == expected[name].dtype, name
        assert torch.equal(loaded[name], expected[name]), name


@pytest.mark.parametrize("overrides", [{"feature_map": name} for name in MAPS] + [
    {"decay": "learned"}, {"attention_window": 0, "attention_sinks": 0}, {"tie_word_embeddings": True},
    {"head_dim": 512, "feature_dim": 600},
    {"attention_window": 0, "attention_sinks": 0, "normalize": False, "output_norm": "group_norm", "output_gate": True,
     "decay": "retnet", "key_scale": False, "dct_direction": "inverse"},
], ids=str)  # fmt: skip
def test_save_and_load_keep_every_tensor_and_logit(tmp_path, overrides):
    model, ids = tiny_model(seed=3, **overrides), random_ids(2, 30)
    model.save_pretrained(tmp_path)
    poison = [torch.full((1 << 16,), float("nan")) for _ in range(64)]
    del poison  # memory that is not written again would now hold NaN
    loaded = DiJiangForCausalLM.from_pretrained(tmp_path)
    assert_same_tensors(loaded, model)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("feature_map", MAPS)
def test_missing_kernel_parameters_get_their_seeded_start_and_others_stay(tmp_path, feature_map):
    from safetensors.torch import load_file, save_file

    model = tiny_model(seed=4, feature_map=feature_map)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    dropped = {name for name in state if "layers.1" in name and ("feature_map_k" in name or "_scale.bias" in name)}
    assert any("key_scale" in name for name in dropped)
    save_file({name: x for name, x in state.items() if name not in dropped}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, fresh = DiJiangForCausalLM.from_pretrained(tmp_path), DiJiangForCausalLM(model.config)
    for name, tensor in loaded.named_parameters():
        expected = dict((fresh if name in dropped else model).named_parameters())[name]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loading_keeps_kernel_parameters_and_tables_in_float32(tmp_path, dtype):
    model = tiny_model(seed=5, decay="learned")
    model.save_pretrained(tmp_path)
    loaded = DiJiangForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    expected = tensors_of(model)
    for name, tensor in tensors_of(loaded).items():
        if any(part in name for part in ("feature_map", "branch_scale", "key_scale", "decay")):
            assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name]), name
        elif "inv_freq" not in name:
            assert tensor.dtype == dtype, name
    logits = loaded(random_ids(1, 40)).logits
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits.float(), model(random_ids(1, 40)).logits, atol=0.5, rtol=0.1)


def test_building_twice_gives_the_same_kernel_and_seeds_change_it():
    first, again = DiJiangModel(tiny_config()), DiJiangModel(tiny_config())
    other = DiJiangModel(tiny_config(feature_seed=100))
    name = "layers.1.self_attn.feature_map_q.T"
    values = [dict(model.named_parameters())[name] for model in (first, again, other)]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    assert not torch.equal(values[0], dict(first.named_parameters())[name.replace("1", "0")])


def test_sharded_save_loads_equal(tmp_path):
    model = tiny_model(seed=6)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_tensors(DiJiangForCausalLM.from_pretrained(tmp_path), model)


def test_installed_package_needs_no_remote_code(tmp_path):
    model = tiny_model(seed=7)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is DiJiangForCausalLM
    assert_same_tensors(loaded, model)


STRANGER = """
    import sys
    sys.modules["dijiang"] = None  # every import of it fails from here on
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
    first, second, data = sys.argv[1:]
    expected = torch.load(data)
    ids = expected["ids"]
    trust = {"trust_remote_code": True}
    assert AutoConfig.from_pretrained(first, **trust).model_type == "dijiang"
    for folder in (first, second):
        model = AutoModelForCausalLM.from_pretrained(folder, **trust).eval()
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        assert torch.equal(model(ids).logits, expected["logits"])
        for cached in (True, False):
            assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False, use_cache=cached), expected["tokens"])
        body = AutoModel.from_pretrained(folder, **trust).eval()
        assert torch.equal(body(ids).last_hidden_state, expected["hidden"])
        classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **trust).eval()
        assert torch.equal(classifier.model(ids).last_hidden_state, expected["hidden"])
        assert classifier(ids, attention_mask=torch.ones_like(ids)).logits.shape == (2, 3)
        if folder == first:
            model.save_pretrained(second)
    print("all loaded")
"""


@pytest.mark.parametrize("feature_map", ["wdcf", "prf"])
def test_stranger_loads_saves_and_loads_again_without_the_package(tmp_path, feature_map):
    model, ids = tiny_model(seed=8, feature_map=feature_map, decay="learned"), random_ids(2, 25)
    first = tmp_path / "a-checkpoint.v1"
    model.save_pretrained(first)
    with torch.no_grad():
        expected = {
            "ids": ids,
            "logits": model(ids).logits,
            "hidden": model.model(ids).last_hidden_state,
            "tokens": model.generate(ids, max_new_tokens=20, do_sample=False, use_cache=False),
        }
    torch.save(expected, tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STRANGER), first, tmp_path / "saved-again", tmp_path / "expected.pt"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("all loaded")
    maps = [json.loads((folder / "config.json").read_text())["auto_map"] for folder in (first, tmp_path / "saved-again")]
    assert maps[0] == maps[1] and len(maps[0]) == 4
    assert {path.name for path in SHIPPED} <= {path.name for path in (tmp_path / "saved-again").iterdir()}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_import_only_what_every_user_has(path):
    """transformers scans them by regular expression, docstrings included, and copies flat siblings only."""
    assert set(get_imports(path)) <= {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    for name in get_relative_imports(path):
        assert (path.parent / f"{name}.py").is_file(), name


def test_every_shipped_file_is_imported_by_those_that_transformers_begins_with():
    """transformers 5.9 copies no others out of a folder."""
    roots = [path for path in SHIPPED if path.name in ("modeling_dijiang.py", "configuration_dijiang.py")]
    named = {name for path in roots for name in get_relative_imports(path)}
    assert named | {path.stem for path in roots} == {path.stem for path in SHIPPED}

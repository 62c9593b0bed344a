"""Every bundled recipe and DeepSpeed file: each loads, each key is explained, and the costs in the headers are right."""

import json
import re
from pathlib import Path

import pytest

from dijiang.checkpoint.shapes import SHAPES
from dijiang.train.estimate.estimate import estimate
from dijiang.train.estimate.stage_cost import BUCKET, LEVELS, LIVE
from dijiang.train.recipe.load import load_recipe

CONFIGS = Path(__file__).parents[1] / "configs"
EVERY = sorted((CONFIGS / "recipes").glob("*.yaml"))
RECIPES = [path for path in EVERY if path.stem != "demo"]  # which asks nothing of the hub
DEEPSPEED = sorted((CONFIGS / "deepspeed").glob("*.json"))
EXPECTED = {f"pythia-{size}" for size in ("70m", "160m", "410m", "1b", "2.8b")}
EXPECTED |= {f"smollm2-135m{kind}" for kind in ("", "-heads", "-constant", "-linear")} | {"tinyllama-1.1b", "llama2-7b"}

by_name = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def test_all_are_there():
    assert {path.stem for path in RECIPES} >= EXPECTED
    assert {path.stem for path in DEEPSPEED} == set(LEVELS)


@by_name
def test_recipes_stream_and_measure_on_other_text(path):
    recipe = load_recipe(path)
    assert recipe.source in SHAPES
    assert recipe.output == f"runs/{path.stem}" and recipe.data.held_out and recipe.data.streaming
    assert recipe.run.deepspeed is None or (CONFIGS / "deepspeed" / f"{recipe.run.deepspeed}.json").is_file()
    # the text that measures is not the text that trains
    measured = {(source.path, source.subset, source.split) for source in recipe.data.held_out}
    assert not measured & {(source.path, source.subset, source.split) for source in recipe.data.train}


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_every_key_is_explained_on_its_line(path):
    assert load_recipe(path).stages == (["distill"] if load_recipe(path).fit else ["align", "distill"])
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        key, _, comment = line.partition("#")
        assert len(line) <= 127
        if re.fullmatch(r"\w+:", key.strip()) and key == line:  # a section whose keys explain themselves
            assert line.strip() in ("data:", "run:", "convert:"), line  # the others say what they do
            continue
        value = re.fullmatch(r"\s*(- )?\w+:( \S+)? +", key)
        assert value, line
        if value[2]:
            assert re.match(r" (int|float|str|bool|list)\b,? \w+", comment), line
        else:
            assert len(comment) > 10, line


@by_name
def test_the_header_says_what_the_estimate_says(path):
    said = re.findall(r"^# Estimate: (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(said) == 1
    gpus, gpu = re.match(r"(\d+) x (\S+) at ", said[0]).groups()
    found = estimate(load_recipe(path), gpu=gpu, gpus=int(gpus))
    assert said[0] == found.summary
    assert all(found.fits(stage, found.level) for stage in found.stages)


@by_name
def test_batches_divide_among_the_devices_of_the_header(path):
    gpus = int(re.search(r"^# Estimate: (\d+) x", path.read_text(encoding="utf-8"), re.MULTILINE)[1])
    recipe = load_recipe(path)
    for stage in recipe.stages:
        assert getattr(recipe, stage).batch_size % (gpus * recipe.run.micro_batch_size) == 0


def test_own_text_as_the_headers_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in RECIPES:
        header = " ".join(re.findall(r"^# (.*)", path.read_text(encoding="utf-8"), re.MULTILINE))
        sets = [quoted or bare for quoted, bare in re.findall(r"--set (?:'([^']+)'|(\S+))", header)]
        recipe = load_recipe(path, sets)
        names = [source.path for source in recipe.data.train + recipe.data.held_out]
        assert names == ["books/*.txt", "held_out.txt"] and not recipe.data.streaming


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_files(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    zero = content["zero_optimization"]
    assert zero["stage"] == int(path.stem[4])
    assert "optimizer" not in content and "train_batch_size" not in content and content["bf16"] == {"enabled": False}
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert content[key] == "auto"
    offload = path.stem.endswith("offload")
    assert ("offload_optimizer" in zero) == offload and ("offload_param" in zero) == (offload and zero["stage"] == 3)
    if zero["stage"]:  # what the estimate counts with
        assert zero["reduce_bucket_size"] == BUCKET
    if zero["stage"] == 3:
        assert zero["stage3_gather_16bit_weights_on_model_save"] is True
        assert zero["stage3_max_live_parameters"] == LIVE


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_knows_every_key(path):
    zero_config = pytest.importorskip("deepspeed.runtime.zero.config")
    given = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]
    fields = zero_config.DeepSpeedZeroConfig.model_fields
    assert given.keys() <= {field.alias or name for name, field in fields.items()}
    assert zero_config.DeepSpeedZeroConfig(**given).stage == given["stage"]

"""The estimate as a table, and sources that it refuses."""

from dijiang_testing.estimates import LLAMA, build_recipe
from transformers import BertConfig

from dijiang.train.estimate.estimate import GIB, estimate, render
from dijiang.train.estimate.hardware import DEVICES
from dijiang.train.estimate.stage_cost import LEVELS


def test_what_fits_is_marked():
    costs = estimate(build_recipe("meta-llama/Llama-2-7b-hf", distill={}, deepspeed="zero3"), gpu="h100", gpus=8)
    text = render(costs).splitlines()
    marks = next(line for line in text if line.strip().startswith("of 79 GiB"))
    for level in LEVELS:
        total = sum(costs.stages["distill"].memory[level].values()) / GIB
        assert costs.fits("distill", level) == (total <= 0.9 * DEVICES["h100"].memory)
    assert not costs.fits("distill", "zero0") and costs.fits("distill", "zero3")
    assert marks.count("fits") + marks.count("too large") == len(LEVELS) and "too large" in marks
    assert text[0].startswith("meta-llama/Llama-2-7b-hf: 6,738,415,616 parameters")
    assert "8 x h100 at 35% of its peak: distill" in text[1] and text[1].endswith("GiB per device with zero3")


def test_a_deepspeed_file_of_the_users_own_has_no_level(known):
    costs = estimate(build_recipe(known(LLAMA), distill={}, deepspeed="mine.json"))
    assert costs.level is None and "with" not in costs.summary


def test_refusals(known, pair, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    plain = build_recipe(known(LLAMA), distill={})
    refused(tmp_path, lambda: estimate(plain, gpu="h1000"), "^gpu 'h1000' is unknown .did you mean h100.*choose from h200, ")
    refused(tmp_path, lambda: estimate(plain, gpus=0), "^gpus=0 must be at least 1$")
    for source, message in (
        (pair.checkpoint, "is a dijiang model, whose conversion starts from"),
        ("nobody/nothing-here", "^the config of nobody/nothing-here cannot be read"),
        (known(BertConfig()), "^nowhere is a bert model"),
    ):
        refused(tmp_path, lambda source=source: estimate(build_recipe(source, distill={})), message)

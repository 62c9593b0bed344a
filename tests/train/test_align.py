"""The align stage from end to end on a tiny model: what it changes, what it records, what it refuses."""

import json
import math
import re
import shutil
from importlib import import_module
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils.logging import disable_progress_bar

from dijiang.convert import convert_model, load_source, read_provenance
from dijiang.train import AlignConfig, align, token_blocks
from dijiang.train.align import block_order, choose_device, learning_rate_factor
from dijiang.train.attention_transfer import kernel_parameters, layer_losses, run_teacher

module = import_module("dijiang.train.align")  # the package's attribute of this name is the function
WEIGHTS = "model.safetensors"
SETTINGS = {"tokens": 3200, "block_size": 32, "learning_rate": 0.1, "dtype": "float32", "device": "cpu"}
KERNEL = (".feature_map_q.", ".feature_map_k.", ".branch_scale.", ".key_scale.", ".decay.")


@pytest.fixture
def run(pair, text_file, tmp_path):
    """run(name, checkpoint=..., teacher=..., data=..., progress=False, **settings): align the pair into tmp_path / name."""

    def call(name="out", *, checkpoint=pair.checkpoint, teacher=pair.teacher, data=(text_file,), progress=False, **settings):
        config = AlignConfig(**(SETTINGS | settings))
        return align(checkpoint, tmp_path / name, teacher=teacher, data=data, config=config, progress=progress)

    return call


@pytest.fixture(scope="module")
def aligned(pair, text_file, tmp_path_factory):
    """A folder that `align` wrote, to read only."""
    folder = tmp_path_factory.mktemp("aligned") / "out"
    return align(
        pair.checkpoint, folder, teacher=pair.teacher, data=[text_file], config=AlignConfig(**SETTINGS), progress=False
    )


def loss_on_other_text(checkpoint, pair, tmp_path) -> float:
    """Mean loss of the layers on words that no test trains on."""
    (tmp_path / "other.txt").write_text("a rat on the mat and the cat on the rat sat and sat on a mat on the cat and " * 20)
    student, tokenizer = load_source(checkpoint)
    blocks = token_blocks(tokenizer, [tmp_path / "other.txt"], 32)
    with torch.no_grad():
        losses = [loss.item() for _, loss in layer_losses(student, run_teacher(load_source(pair.teacher)[0], blocks))]
    return sum(losses) / len(losses)


def split(tensors: dict) -> tuple[dict, dict]:
    """(kernel tensors, all others)."""
    kernels = {name: tensor for name, tensor in tensors.items() if any(part in name for part in KERNEL)}
    return kernels, {name: tensor for name, tensor in tensors.items() if name not in kernels}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


# --- what it does ---


def test_the_loss_falls(aligned, run, pair, tmp_path):
    stage = read_provenance(aligned)["stages"][-1]
    assert 0 < stage["loss_last"] < 0.8 * stage["loss_first"]
    converted, calibrated, trained = (
        loss_on_other_text(folder, pair, tmp_path)
        for folder in (pair.checkpoint, run("calibrated", tokens=32, learning_rate=1e-9), aligned)
    )
    assert trained < 0.9 * calibrated and calibrated < 0.9 * converted


def test_only_kernel_tensors_change(aligned, pair):
    (old_kernels, old_rest), (new_kernels, new_rest) = (
        split(load_file(folder / WEIGHTS)) for folder in (pair.checkpoint, aligned)
    )
    assert old_rest and old_rest.keys() == new_rest.keys()
    assert all(same_bits(tensor, new_rest[name]) for name, tensor in old_rest.items())
    assert old_kernels.keys() == new_kernels.keys() == kernel_parameters(load_source(aligned)[0]).keys()
    for name, tensor in new_kernels.items():
        assert tensor.dtype == torch.float32 and torch.isfinite(tensor).all()
        assert not torch.equal(tensor, old_kernels[name]), name


def test_all_other_files_are_copied(aligned, pair):
    files = {path.name: path.read_bytes() for path in pair.checkpoint.iterdir()}
    copied = {path.name: path.read_bytes() for path in aligned.iterdir()}
    assert files.keys() == copied.keys() and "modeling_dijiang.py" in files and "tokenizer.json" in files
    assert {name for name in files if files[name] != copied[name]} == {WEIGHTS, "provenance.json"}


def test_provenance_tells_the_stage(aligned, pair, text_file):
    before, after = read_provenance(pair.checkpoint), read_provenance(aligned)
    assert {key: value for key, value in after.items() if key != "stages"} == {
        key: value for key, value in before.items() if key != "stages"
    }
    assert after["stages"][:-1] == before["stages"]
    stage = after["stages"][-1]
    blocks = len(token_blocks(load_source(pair.checkpoint)[1], [text_file], 32))
    assert stage["stage"] == "align" and stage["versions"].keys() == {"python", "dijiang", "torch", "transformers"}
    assert (stage["teacher"], stage["data"]) == (pair.teacher.name, [text_file.name])
    assert AlignConfig(**stage["config"]) == AlignConfig(**SETTINGS)
    assert stage["tokens"] == 3200 and stage["epochs"] == pytest.approx(100 / blocks)
    assert (stage["dtype"], stage["device"]) == ("float32", "cpu")
    assert 0 < stage["calibration_r2"] < 1 and stage["seconds"] > 0


@pytest.mark.parametrize(("settings", "steps"), [({"tokens": 100}, 3), ({"tokens": 100, "batch_size": 3}, 1)])
def test_the_budget_is_rounded_down_to_whole_steps(run, monkeypatch, settings, steps):
    seen = []
    monkeypatch.setattr(module, "run_teacher", lambda teacher, ids: seen.append(ids.shape) or run_teacher(teacher, ids))
    out = run(**settings, calibration_blocks=0)
    assert seen == [(settings.get("batch_size", 1), 32)] * steps
    stage = read_provenance(out)["stages"][-1]
    assert stage["tokens"] == sum(batch * length for batch, length in seen) and "calibration_r2" not in stage


def test_one_seed_gives_one_result(run, aligned):
    first, second, other = (load_file(folder / WEIGHTS) for folder in (aligned, run("again"), run("other", seed=1)))
    assert all(same_bits(tensor, second[name]) for name, tensor in first.items())
    assert not any(torch.equal(tensor, other[name]) for name, tensor in split(first)[0].items())


def test_the_output_loads_as_a_model(aligned, pair, tokens):
    model, tokenizer = load_source(aligned)
    for name, tensor in load_file(aligned / WEIGHTS).items():
        assert torch.equal(model.get_parameter(name), tensor)
    with torch.no_grad():
        difference = model(tokens(30)).logits - load_source(pair.checkpoint)[0](tokens(30)).logits
    assert 0.01 < difference.abs().max() < math.inf
    assert tokenizer.get_vocab() == load_source(pair.checkpoint)[1].get_vocab()


def test_calibration_is_what_an_untrained_model_starts_from(run, pair, text_file, monkeypatch):
    """With a vanishing learning rate the output is the calibration's; the blocks it saw are the first ones of the order."""
    monkeypatch.setattr(module, "train", lambda student, *args: {"tokens": 0})
    out = run(seed=4, calibration_blocks=3, quiet=0.5)
    student, tokenizer = load_source(pair.checkpoint)
    blocks = token_blocks(tokenizer, [text_file], 32)
    order = block_order(len(blocks), 4)
    first = torch.stack([blocks[next(order)] for _ in range(3)])
    fit = module.calibrate(student, load_source(pair.teacher)[0], first, 0.5)
    assert read_provenance(out)["stages"][-1]["calibration_r2"] == pytest.approx(fit)
    for name, tensor in split(load_file(out / WEIGHTS))[0].items():
        assert torch.allclose(tensor, student.get_parameter(name), atol=1e-6), name


def test_training_reads_the_calibration_blocks_too(run, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "run_teacher", lambda teacher, ids: seen.append(ids) or run_teacher(teacher, ids))
    run(tokens=96, calibration_blocks=2)
    assert [len(ids) for ids in seen] == [2, 1, 1, 1]
    assert torch.equal(seen[0], torch.cat(seen[1:3])) and not torch.equal(seen[3], seen[1])


def test_a_second_align_goes_on_without_calibration(run, aligned, monkeypatch):
    monkeypatch.setattr(module, "calibrate", lambda *args: pytest.fail("calibrated again"))
    again = run("again", checkpoint=aligned, tokens=320, learning_rate=1e-3, seed=5)
    stages = read_provenance(again)["stages"]
    assert [stage["stage"] for stage in stages] == ["convert", "align", "align"]
    assert stages[:2] == read_provenance(aligned)["stages"] and "calibration_r2" not in stages[2]
    assert stages[2]["loss_first"] < 1.1 * stages[1]["loss_last"]


def test_half_precision_computes_but_does_not_round_the_weights(run, pair):
    out = run(dtype="bfloat16")
    assert read_provenance(out)["stages"][-1]["dtype"] == "bfloat16"
    (old_kernels, old_rest), (new_kernels, new_rest) = (
        split(load_file(folder / WEIGHTS)) for folder in (pair.checkpoint, out)
    )
    assert all(same_bits(tensor, new_rest[name]) for name, tensor in old_rest.items())
    assert {tensor.dtype for tensor in old_rest.values()} == {torch.float32}
    assert not any(torch.equal(tensor, tensor.bfloat16().float()) for tensor in new_kernels.values())
    assert not any(torch.equal(tensor, old_kernels[name]) for name, tensor in new_kernels.items())


@pytest.mark.parametrize(("settings", "fixed"), [({"decay": "learned"}, False), ({"decay": "retnet"}, True)])
def test_decay_trains_only_if_it_is_learned(run, pair, tmp_path, settings, fixed):
    made = convert_model(pair.teacher, tmp_path / "made", progress=False, attention_window=4, attention_sinks=2, **settings)
    old, new = load_file(made / WEIGHTS), load_file(run(checkpoint=made, tokens=96) / WEIGHTS)
    rates = [name for name in old if name.endswith("decay.log_rate")]
    assert len(rates) == 2 and all(torch.equal(old[name], new[name]) == fixed for name in rates)


@pytest.mark.parametrize(
    "settings",
    [
        {"feature_map": "wdcf", "attention_window": 4, "attention_sinks": 2},
        {"feature_map": "elu", "attention_window": 4, "attention_sinks": 2},
        {"feature_map": "relu", "attention_window": 4, "attention_sinks": 2},
        {"feature_map": "cosformer", "attention_window": 4, "attention_sinks": 2},
        {"feature_map": "identity", "attention_window": 0, "attention_sinks": 0, "normalize": False},
        {"feature_map": "wpff", "attention_window": 0, "attention_sinks": 0, "decay": "retnet"},
    ],
    ids=str,
)
def test_every_shape_of_linear_layer_aligns(run, pair, tmp_path, settings):
    made = convert_model(pair.teacher, tmp_path / "made", progress=False, **settings)
    old, new = load_file(made / WEIGHTS), load_file(run(checkpoint=made, tokens=96) / WEIGHTS)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in split(old)[0] if "decay" not in name}


def test_mixed_layers(run, pair, tmp_path):
    layers = ["full_attention", "linear_attention"]
    made = convert_model(
        pair.teacher, tmp_path / "made", progress=False, layer_types=layers, attention_window=4, attention_sinks=2
    )
    old, new = load_file(made / WEIGHTS), load_file(run(checkpoint=made, tokens=320) / WEIGHTS)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == split(old)[0].keys() and all(name.startswith("model.layers.1.") for name in changed)


def test_sharded_checkpoints_keep_their_shards(run, pair, tmp_path, monkeypatch):
    monkeypatch.setattr("dijiang.convert.writer.SHARD_BYTES", 30_000)
    settings = {"attention_window": 4, "attention_sinks": 2, "branch_scale_init": 0.5}
    made = convert_model(pair.teacher, tmp_path / "made", progress=False, **settings)
    out, whole = run(checkpoint=made, tokens=96), run("whole", tokens=96)
    shards = sorted(path.name for path in made.glob("*.safetensors*"))
    assert len(shards) > 3 and sorted(path.name for path in out.glob("*.safetensors*")) == shards
    merged = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    expected = load_file(whole / WEIGHTS)
    assert merged.keys() == expected.keys() and all(torch.equal(merged[name], expected[name]) for name in expected)
    assert not load_source(out)[0].training


def test_lines_of_progress(run, capsys):
    disable_progress_bar()  # transformers' own
    run("quiet")
    assert capsys.readouterr() == ("", "")
    run("loud", progress=True)
    out, err = capsys.readouterr()
    number = r"[\d,]+"
    line = rf"Aligning: 3,200/3,200 tokens, {number} tokens/s, loss \d+\.\d{{4}}, 0 s left\n"
    assert out == "" and re.fullmatch(line, err)


# --- its parts ---


def test_block_order_is_a_new_permutation_each_time_round():
    order = block_order(7, seed=3)
    rounds = [[next(order) for _ in range(7)] for _ in range(4)]
    assert all(sorted(round_) == list(range(7)) for round_ in rounds)
    assert len({tuple(round_) for round_ in rounds}) == 4
    again, other = block_order(7, seed=3), block_order(7, seed=4)
    whole = [index for round_ in rounds for index in round_]
    assert [next(again) for _ in range(28)] == whole and [next(other) for _ in range(28)] != whole


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    rates = [learning_rate_factor(step, 200) for step in range(201)]
    assert rates[:11] == pytest.approx([*(step / 11 for step in range(1, 11)), 1.0])
    assert rates[105] == pytest.approx(0.525) and rates[200] == pytest.approx(0.05)  # half-way down, and the end
    assert all(late < early for early, late in pairwise(rates[10:]))
    assert 0 < learning_rate_factor(0, 1) <= 1


def test_the_optimiser_follows_that_schedule(run, monkeypatch):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    run(tokens=32 * 40, learning_rate=0.2)
    assert rates == pytest.approx([0.2 * learning_rate_factor(step, 40) for step in range(40)])


# --- what it refuses ---


def copy_checkpoint(folder, to, **config):
    """A copy of the checkpoint in `folder`, with changes to its config."""
    shutil.copytree(folder, to)
    (to / "config.json").write_text(json.dumps(json.loads((to / "config.json").read_text()) | config))
    return to


def test_a_folder_that_no_conversion_wrote(run, pair, tmp_path, refused):
    message = r"teacher holds no provenance\.json, so it is not a DiJiang checkpoint; make one with `dijiang convert`$"
    refused(tmp_path, lambda: run(checkpoint=pair.teacher), message)
    refused(tmp_path, lambda: run(checkpoint=tmp_path / "none"), r"none holds no provenance\.json")


def test_a_teacher_of_the_same_shape_and_other_weights(run, make_source, pair, tmp_path, refused):
    other, _ = make_source(seed=1, num_key_value_heads=2)
    said = rf"{other} is not the model that this checkpoint was converted from \(teacher\)"
    refused(tmp_path, lambda: run(teacher=other), f"^{said}: their weights differ; give that one$")


def test_a_teacher_of_another_shape(run, make_source, pair, tmp_path, refused):
    bigger, _ = make_source(num_hidden_layers=3, num_key_value_heads=2)
    refused(tmp_path, lambda: run(teacher=bigger), "is not the model that this checkpoint was converted from")
    # the very weights, read as two heads of twice the size
    reshaped = copy_checkpoint(pair.teacher, tmp_path / "reshaped", num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    refused(
        tmp_path,
        lambda: run(teacher=reshaped),
        rf"^teacher {reshaped} does not fit the checkpoint: num_attention_heads is 2, expected 4$",
    )


def test_a_teacher_with_linear_attention(run, pair, tmp_path, refused):
    message = rf"^teacher {pair.checkpoint} has linear-attention layers; give the softmax model that was converted$"
    refused(tmp_path, lambda: run(teacher=pair.checkpoint), message)


def test_a_teacher_converted_with_softmax_will_do(run, pair, tmp_path, aligned):
    softmax = convert_model(pair.teacher, tmp_path / "softmax", progress=False, layer_types="full_attention")
    new, expected = load_file(run(teacher=softmax) / WEIGHTS), load_file(aligned / WEIGHTS)
    assert all(torch.allclose(new[name], expected[name], atol=1e-5) for name in expected)


def test_a_checkpoint_without_linear_layers(run, pair, tmp_path, refused):
    softmax = convert_model(pair.teacher, tmp_path / "softmax", progress=False, layer_types="full_attention")
    message = "{} has no linear-attention layer with kernel parameters, so there is nothing to align$"
    refused(tmp_path, lambda: run(checkpoint=softmax), message.format(softmax))
    plain = {"feature_map": "elu", "output_norm": "none", "output_gate": False}
    bare = convert_model(pair.teacher, tmp_path / "bare", "paper", progress=False, **plain)
    refused(tmp_path, lambda: run(checkpoint=bare), message.format(bare))


def test_a_teacher_that_is_not_there(run, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(tmp_path, lambda: run(teacher=tmp_path / "none"), "none is neither a folder, nor a GGUF file, nor a hub id")


def test_an_output_that_is_taken(run, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(module, "load_source", lambda *args, **kwargs: pytest.fail("began to work"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").write_text("1")
    refused(tmp_path, run, r"output folder .*out is not empty; choose a new one or empty it$")
    refused(tmp_path, lambda: run("out/theirs"), r"theirs is a file; choose a new folder$")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"data\.txt is empty; give a file with text$"),
        (b"cat \xff", r"data\.txt is not UTF-8 text \(byte 4\); convert it to UTF-8$"),
        (b"the cat", r"data\.txt: \d+ tokens do not fill one block of 32; give more text or a smaller block$"),
        (None, r"cannot read .*data\.txt: No such file or directory$"),
    ],
)
def test_data_that_will_not_do(run, tmp_path, refused, content, message):
    data = tmp_path / "data.txt"
    if content is not None:
        data.write_bytes(content)
    refused(tmp_path, lambda: run(data=[data]), message)


def test_blocks_too_short_for_the_window(run, tmp_path, refused):
    message = "^blocks of 11 tokens are too short for a window of 4; use longer blocks$"
    refused(tmp_path, lambda: run(block_size=11, tokens=110), message)


def test_the_papers_layer_is_not_for_attention_transfer(run, pair, tmp_path, refused):
    made = convert_model(pair.teacher, tmp_path / "made", "paper", progress=False)
    refused(tmp_path, lambda: run(checkpoint=made), "^.*made has output_norm or output_gate, .* such as preset recommended$")


def test_a_loss_that_stops_being_finite(run, tmp_path, refused):
    message = r"^(the loss of layer \d is nan at step \d+|model\.\S+ is not finite after training); lower learning_rate$"
    refused(tmp_path, lambda: run(learning_rate=1e38), message)
    refused(tmp_path, lambda: run("a/b/c", learning_rate=1e38), message)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (0, "^the loss of layer 1 is nan at step 0; lower learning_rate$"),
        (1, "^layer 1 gives no finite numbers on the text; check the checkpoint, or try dtype=float32$"),
    ],
)
def test_weights_that_make_no_number(run, pair, tmp_path, refused, blocks, message):
    broken = copy_checkpoint(pair.checkpoint, tmp_path / "broken")
    tensors = load_file(broken / WEIGHTS)
    tensors["model.layers.1.self_attn.feature_map_q.T"][0, 0] = torch.nan
    save_file(tensors, broken / WEIGHTS, metadata={"format": "pt"})
    refused(tmp_path, lambda: run(checkpoint=broken, calibration_blocks=blocks), message)


def test_an_interruption_leaves_nothing(run, tmp_path, monkeypatch):
    calls = []

    def interrupt(student, kept):
        calls.append(kept)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return layer_losses(student, kept)

    monkeypatch.setattr(module, "layer_losses", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("new/out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_where_there_is_none(run, tmp_path, refused):
    refused(tmp_path, lambda: run(device="cuda"), "^device='cuda' cannot be used here: .+")
    assert choose_device("auto") == torch.device("cpu")


def test_a_device_of_no_kind(run, tmp_path, refused):
    refused(tmp_path, lambda: run(device="gpu"), "^device='gpu' is unknown; choose auto, cpu or cuda$")


@pytest.mark.gpu
def test_on_a_gpu(run, aligned):
    new, expected = load_file(run(device="cuda") / WEIGHTS), load_file(aligned / WEIGHTS)
    kernels, rest = split(new)
    assert all(same_bits(tensor, expected[name]) for name, tensor in rest.items())
    assert all(torch.allclose(tensor, expected[name], atol=0.02) for name, tensor in kernels.items())

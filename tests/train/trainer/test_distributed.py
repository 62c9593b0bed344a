"""How a batch is dealt out, DeepSpeed's settings, devices, and errors that processes share. See test_distributed_runs.py."""

import pytest
import torch
from dijiang_testing.training import WIDTH, run_config, stage_config

from dijiang.train.trainer.distributed import (
    accumulation,
    choose_device,
    deepspeed_settings,
    micro_batch,
    prepare_process,
    share_errors,
)


def test_a_batch_that_cannot_be_dealt_out(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for batch, most, micro in ((12, 2, 2), (12, 4, 4), (6, 4, 2), (3, 4, 1), (15, 4, 1), (36, 5, 4)):
        stage, run = stage_config(batch_size=batch), run_config(micro_batch_size=most)
        assert micro_batch(stage, run) == micro and accumulation(stage, run) * micro * 3 == batch
    with pytest.raises(ValueError, match=r"^batch_size=4 cannot be dealt out to 3 processes; make it a multiple of 3"):
        accumulation(stage_config(batch_size=4), run_config(micro_batch_size=4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"zero_', r"is not valid JSON"),
        ("[]", r"must hold a JSON object"),
        ('{"gradient_clipping": 3}', r"sets gradient_clipping, which clip of the stage in the recipe decides"),
        ('{"optimizer": {"type": "AdamW"}}', r"sets optimizer, which the stage's learning rates in the recipe decides"),
        ('{"bf16": {"enabled": true}}', r"enables bf16; remove it there"),
    ],
)
def test_deepspeed_settings_that_contradict_the_recipe(tmp_path, content, message):
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        deepspeed_settings(stage_config(), run_config(deepspeed=str(path)), WIDTH)
    assert "\n" not in str(caught.value)


def test_deepspeed_settings_are_filled_in(tmp_path):
    path = tmp_path / "ds.json"
    zero = '{"stage": 3, "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}'
    path.write_text(f'{{"bf16": {{"enabled": "auto"}}, "train_batch_size": "auto", "zero_optimization": {zero}}}')
    run = run_config(micro_batch_size=3, deepspeed=str(path))
    assert deepspeed_settings(stage_config(batch_size=6, clip=0.5), run, 100) == {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 10_000, "stage3_param_persistence_threshold": 1_000},
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
    }
    with pytest.raises(ValueError, match="deepspeed='zero9' is neither a file nor one of zero0, zero1"):
        deepspeed_settings(stage_config(), run_config(deepspeed="zero9"), WIDTH)


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP"])
def test_settings_of_accelerate_launch(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=f"^accelerate launch was configured with {name} settings of its own; "):
        prepare_process(run_config())


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"^device='cuda:1' names one GPU; use device='cuda' and CUDA_VISIBLE_DEVICES=1$"):
        choose_device("cuda:1")
    with pytest.raises(ValueError, match=r"^device 'gpu' is unknown \(did you mean cpu\?\); choose from auto, cpu, cuda$"):
        choose_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_where_there_is_none():
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"^device cuda was asked for, but torch finds no GPU; choose cpu$"):
        choose_device("cuda")


def test_errors_of_one_process_pass_unchanged():
    error = ValueError("this")
    with pytest.raises(ValueError, match="this") as caught, share_errors():
        raise error
    assert caught.value is error
    with pytest.raises(KeyError), share_errors():
        raise KeyError

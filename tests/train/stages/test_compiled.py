"""The distil stage through torch.compile: the same loss and gradients, one code for all layers, and none where it fails."""

import dataclasses

import pytest
import torch
from dijiang_testing.model_checks import assert_close, random_ids, tiny_model
from torch._dynamo.testing import CompileCounter

from dijiang.convert.presets import PRESETS
from dijiang.train.recipe.load import differences
from dijiang.train.recipe.schema import DataConfig, DistillConfig, Recipe, RunConfig, SourceConfig
from dijiang.train.stages import compiled
from dijiang.train.stages.compiled import compile_model, wants_compilation
from dijiang.train.stages.distill import DistillModel
from dijiang.train.stages.distillation_loss import dense_rows, loss_of_rows

WINDOW = PRESETS["linear"] | {"attention_window": 5, "attention_sinks": 2}


@pytest.fixture
def counter(monkeypatch):
    """Compiles as far as needs no code generator, and counts how often."""
    torch._dynamo.reset()
    found = CompileCounter()
    monkeypatch.setattr(compiled, "BACKEND", found)
    return found


def build(layers: int = 3, **settings) -> DistillModel:
    config = DistillConfig(tokens=64, block_size=32, chunk_tokens=16)
    teacher = tiny_model(7, layer_types=["full_attention"] * layers, num_hidden_layers=layers)
    settings = {"layer_types": ["linear_attention"] * layers, "num_hidden_layers": layers, "branch_scale_init": 0.0} | settings
    return DistillModel(tiny_model(1, **settings), teacher, config).train()


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    positions = torch.arange(32) + torch.tensor([[3], [20]])
    return {"input_ids": random_ids(2, 32, seed), "position_ids": positions, "sample_indices": torch.arange(2)}


def step(model: DistillModel, **inputs) -> tuple[dict, dict]:
    outputs = model(**inputs)
    outputs["loss"].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return outputs, gradients


@pytest.mark.parametrize("settings", [PRESETS["linear"], WINDOW], ids=["linear", "window"])
def test_loss_and_gradients_stay_and_layers_share_their_code(settings, counter):
    model = build(**settings)
    expected, wanted = step(model, **batch(1))
    assert compile_model(model, batch())
    compilations = counter.frame_count
    assert compilations == 3  # the student's layer, the teacher's, the loss of some rows
    outputs, gradients = step(model, **batch(1))
    assert counter.frame_count == compilations
    assert_close(outputs["loss"], expected["loss"], "loss")
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, wanted[name], name, tolerance=1e-4)
    assert all("forward" not in vars(layer) for layer in model.student.model.layers)
    model.eval()(**batch(1))  # of other shapes, so not compiled
    assert counter.frame_count == compilations
    again = build(**settings)  # as a second run in the same process
    assert compile_model(again, batch()) and counter.frame_count == compilations


def test_what_fails_to_compile_runs_without_and_says_so(monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no such compiler\nsecond line")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    torch._dynamo.reset()
    model = build(**WINDOW)
    expected, _ = step(model, **batch())
    assert not compile_model(model, batch())
    said = capsys.readouterr().err
    assert said.startswith("dijiang: torch.compile fails here (") and said.count("\n") == 1
    outputs, _ = step(model, **batch())
    assert torch.equal(outputs["loss"], expected["loss"])


def test_memory_that_runs_out_is_no_failure_of_the_compiler(monkeypatch):
    model = build(**WINDOW)

    def forward(**inputs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        compile_model(model, batch())
    assert model.compiled is None


@pytest.mark.parametrize(
    ("run", "data", "stage", "device", "expected"),
    [
        ({}, {}, "distill", "cpu", False),
        ({}, {}, "distill", "cuda", True),
        ({}, {}, "align", "cuda", False),
        ({"compile": True}, {}, "distill", "cpu", True),
        ({"compile": False}, {}, "distill", "cuda", False),
        ({"gradient_checkpointing": True}, {}, "distill", "cuda", False),
        ({"deepspeed": "zero1"}, {}, "distill", "cuda", False),
        ({}, {"respect_documents": True}, "distill", "cuda", False),
    ],
)
def test_when_it_is_wanted(run, data, stage, device, expected):
    data = DataConfig(train=[SourceConfig(path="a.txt")], **({"respect_documents": False} | data))
    recipe = Recipe(source="s", output="o", data=data, distill=DistillConfig(), run=RunConfig(**run))
    assert wants_compilation(recipe, stage, torch.device(device)) is expected


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 0.0, 1.0), (0.5, 0.7, 2.0), (1.0, 0.3, 1.0)])
def test_rows_of_the_loss(weights, wanted):
    generator = torch.Generator().manual_seed(3)
    s, t = (3 * torch.randn(11, 37, generator=generator) for _ in range(2))
    labels = torch.randint(0, 37, (11,), generator=generator)
    labels[::4] = -100
    found = dense_rows(s, t, labels, *weights, wanted)
    expected = loss_of_rows(s.clone(), labels, (t.clone(),), *weights, wanted)
    for name, a, b in zip(("kl", "ce", "gradient"), found, expected, strict=True):
        assert (a is None) == (b is None) == (name == "gradient" and not wanted)
        if a is not None:
            assert_close(a, b, name, tolerance=1e-5)
    halves = dense_rows(s.bfloat16(), t.bfloat16(), labels, *weights, wanted)
    assert halves[0].dtype == halves[1].dtype == torch.float32
    assert not wanted or halves[2].dtype == torch.bfloat16


def test_the_setting_changes_nothing_that_is_learnt():
    a = Recipe(source="s", output="o", data=DataConfig(train=[SourceConfig(path="a")]), distill=DistillConfig())
    assert differences(a, dataclasses.replace(a, run=RunConfig(compile=True, max_minutes=3.0))) == []

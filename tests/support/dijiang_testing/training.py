"""A recovery model of a few parameters, and blocks of random tokens, for tests of the training loop."""

import json
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from dijiang.train.recipe.schema import RunConfig, StageConfig
from dijiang.train.trainer.distributed import choose_device, deepspeed_settings
from dijiang.train.trainer.trainer import RecoveryTrainer, TrainingJob

VOCAB, WIDTH, LENGTH = 31, 12, 9


class Student(nn.Module):
    """Reads the tokens before each one; the embedding is frozen in bfloat16, as a stage's frozen weights are."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH).bfloat16().requires_grad_(False)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids):
        return self.head(self.norm(torch.tanh(self.mix(self.embed(input_ids).float().cumsum(1)))))


class FakeModel(nn.Module):
    """
    Args:
        broken_at: sample index of the block whose loss is NaN.
        steep_at: sample index of the block whose loss is finite, but its gradient is not.
    """

    def __init__(self, seed: int = 0, broken_at: int = -1, steep_at: int = -1):
        super().__init__()
        torch.manual_seed(seed)
        self.student, self.broken_at, self.steep_at = Student(), broken_at, steep_at

    def forward(self, input_ids, position_ids=None, sample_indices=None):
        logits = self.student(input_ids)
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
        if not self.training:
            return {"loss": loss}
        if (sample_indices == self.broken_at).any():
            loss = loss * torch.nan
        if (sample_indices == self.steep_at).any():
            loss = loss + (logits.mean() - logits.mean().detach()).sqrt()
        return {"loss": loss, "logit": logits.detach().square().mean()}

    def trained(self):
        return {name: parameter.detach().clone() for name, parameter in self.named_parameters() if parameter.requires_grad}

    def parameter_groups(self):
        kernel, rest = [*self.student.mix.parameters()], [*self.student.norm.parameters(), *self.student.head.parameters()]
        return [{"name": "kernel", "params": kernel, "lr": 3e-2}, {"name": "rest", "params": rest, "lr": 1e-2}]


class FakeBlocks(Dataset):
    def __init__(self, count: int, seed: int = 0):
        self.ids = torch.randint(0, VOCAB, (count, 1, LENGTH), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        positions = torch.arange(LENGTH)[None]
        return {"input_ids": self.ids[index], "position_ids": positions, "sample_index": torch.tensor(index)}


def stage_config(steps: int = 6, batch_size: int = 4, **settings) -> StageConfig:
    return StageConfig(tokens=steps * batch_size * LENGTH, block_size=LENGTH, batch_size=batch_size, **settings)


def run_config(**settings) -> RunConfig:
    return RunConfig(**{"device": "cpu", "dtype": "float32", "log_every": 1, "save_every": 2, "report_to": []} | settings)


def build_trainer(folder: Path, stage: StageConfig, run: RunConfig, model: FakeModel | None = None, **settings):
    """A RecoveryTrainer of a FakeModel on as many blocks as the stage needs, with seven held-out ones."""
    settings = {
        "stage": stage,
        "run": run,
        "blocks": FakeBlocks(stage.steps * stage.batch_size),
        "held_out": FakeBlocks(7, seed=1),
        "folder": Path(folder),
        "device": choose_device("cpu"),
        "title": "Testing",
        "deepspeed": deepspeed_settings(stage, run, WIDTH),
        "progress": False,
    } | settings
    return RecoveryTrainer(model or FakeModel(), TrainingJob(**settings))


def assert_same_tensors(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Assert that two mappings hold the same bits."""
    assert tensors.keys() == expected.keys()
    for name in expected:
        assert torch.equal(tensors[name], expected[name]), name


def metrics(folder: Path) -> list[dict]:
    """The lines of a stage's metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    clock = ("tokens_per_second", "seconds_left")
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]

"""The training loop on a model of a few parameters, against one written out here; what it logs, resumes and refuses."""

import json
import math

import pytest
import torch
from dijiang_testing.training import (
    LENGTH,
    FakeBlocks,
    FakeModel,
    assert_same_tensors,
    build_trainer,
    metrics,
    run_config,
    stage_config,
)
from safetensors.torch import load_file

from dijiang.train.trainer.checkpoints import Checkpoints
from dijiang.train.trainer.optimizer import learning_rate_factor
from dijiang.train.trainer.saving import WEIGHTS
from dijiang.train.trainer.trainer import library_trackers

pytestmark = pytest.mark.usefixtures("no_waiting")


def oracle(stage, model: FakeModel) -> list[float]:
    """Train `model` by whole batches; returns each step's loss."""
    blocks = FakeBlocks(stage.steps * stage.batch_size)
    kernel, *rest = (list(group["params"]) for group in model.parameter_groups())
    matrices = [p for p in rest[0] if p.dim() == 2]
    vectors = [p for p in rest[0] if p.dim() == 1]
    groups = [
        {"params": kernel, "lr": 3e-2, "weight_decay": 0.0},
        {"params": matrices, "lr": 1e-2, "weight_decay": stage.weight_decay},
        {"params": vectors, "lr": 1e-2, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=stage.betas)
    peaks = [group["lr"] for group in groups]
    losses = []
    for step in range(stage.steps):
        warmup = round(stage.warmup_share * stage.steps)
        if step < warmup:
            factor = (step + 1) / (warmup + 1)
        elif stage.schedule == "flat":
            factor = 1.0
        else:
            angle = math.pi * (step - warmup) / (stage.steps - warmup)
            factor = stage.final_share + (1 - stage.final_share) * (1 + math.cos(angle)) / 2
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        indices = range(step * stage.batch_size, (step + 1) * stage.batch_size)
        ids = torch.cat([blocks[index]["input_ids"] for index in indices])
        loss = model.train()(ids, sample_indices=torch.tensor(indices))["loss"]
        loss.backward()
        if stage.clip:
            torch.nn.utils.clip_grad_norm_([*kernel, *matrices, *vectors], stage.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# --- what it computes ---


@pytest.mark.parametrize(
    ("stage", "micro"),
    [
        ({}, 1),
        ({"batch_size": 6, "clip": 0.3, "weight_decay": 0.5}, 2),
        ({"batch_size": 3, "clip": 0.0, "schedule": "flat", "warmup_share": 0.4, "betas": (0.8, 0.9)}, 3),
        ({"steps": 11, "batch_size": 1, "warmup_share": 0.0, "final_share": 0.5}, 1),
    ],
)
def test_it_trains_as_a_plain_loop_does(tmp_path, stage, micro):
    stage, model, expected = stage_config(**stage), FakeModel(seed=3), FakeModel(seed=3)
    trainer = build_trainer(tmp_path, stage, run_config(micro_batch_size=micro), model)
    assert trainer.run(None) is True
    losses = oracle(stage, expected)
    assert [line["loss"] for line in metrics(tmp_path) if "loss" in line] == pytest.approx(losses, rel=2e-6)
    for name, value in expected.trained().items():
        torch.testing.assert_close(model.trained()[name], value, rtol=2e-4, atol=2e-6, msg=name)
    assert torch.equal(model.student.embed.weight, FakeModel(seed=3).student.embed.weight)


def test_held_out_perplexity_is_that_of_the_mean_block(tmp_path):
    stage, model = stage_config(), FakeModel()
    build_trainer(tmp_path, stage, run_config(evaluate_every=4), model).run(None)
    held_out = FakeBlocks(7, seed=1)
    with torch.no_grad():
        losses = [model.eval()(held_out[i]["input_ids"])["loss"].item() for i in range(7)]
    found = [line for line in metrics(tmp_path) if "eval_loss" in line]
    assert [line["step"] for line in found] == [4, 6]
    assert found[-1]["eval_loss"] == pytest.approx(sum(losses) / 7, rel=1e-6)
    assert found[-1]["eval_perplexity"] == pytest.approx(math.exp(sum(losses) / 7), rel=1e-6)


class Documents(FakeBlocks):
    """Row i begins with i + 1 documents of one token."""

    def __getitem__(self, place):
        positions = torch.cat((torch.zeros(place + 1, dtype=torch.long), torch.arange(LENGTH - 1 - place)))[None]
        return super().__getitem__(place) | {"position_ids": positions}


def test_held_out_blocks_weigh_as_many_tokens_as_they_predict(tmp_path, capsys):
    class PerRow(FakeModel):
        """A loss, and a teacher's, that say which row it is."""

        teacher = True

        def forward(self, input_ids, position_ids=None, sample_indices=None):
            found = super().forward(input_ids, position_ids, sample_indices)
            return found if self.training else {"loss": position_ids.max() / 10}

        def teacher_measured(self, input_ids, position_ids):
            calls.append(len(position_ids))
            return {"loss": position_ids.max() / 20}

    def mean(rows: int) -> float:
        # a row's last token and the last before another document predict nothing
        tokens = [LENGTH - 2 - i for i in range(rows)]
        return sum(n * n / 10 for n in tokens) / sum(tokens)

    calls, stage, run = [], stage_config(), run_config(evaluate_every=2)
    build_trainer(tmp_path, stage, run, PerRow(), held_out=Documents(7, seed=1), progress=True).run(None)
    found = [line for line in metrics(tmp_path) if "eval_loss" in line]
    assert len(found) == 3 and found[0]["eval_loss"] == pytest.approx(mean(7))
    assert [line["eval_teacher_perplexity"] for line in found] == pytest.approx([math.exp(mean(7) / 2)] * 3)
    assert calls == [1] * 7  # once, for it does not change
    perplexity, teacher = math.exp(mean(7)), math.exp(mean(7) / 2)
    said = f"perplexity {perplexity:.3f}, {perplexity / teacher:.3f} times the teacher's {teacher:.3f}"
    assert said in " ".join(capsys.readouterr().err.split())

    # a resumed run may measure on another text
    again = build_trainer(tmp_path, stage, run, PerRow(), held_out=Documents(3, seed=1))
    again.run(again.checkpoints.folder / "checkpoint-4")
    last = metrics(tmp_path)[-1]
    assert [last["eval_perplexity"], last["eval_teacher_perplexity"]] == pytest.approx(
        [math.exp(mean(3)), math.exp(mean(3) / 2)]
    )


def test_logs_hold_the_means_of_their_steps(tmp_path):
    stage = stage_config(steps=7)
    build_trainer(tmp_path / "each", stage, run_config(), held_out=None).run(None)
    build_trainer(tmp_path / "some", stage, run_config(log_every=3), held_out=None).run(None)
    each, some = metrics(tmp_path / "each"), metrics(tmp_path / "some")
    assert [line["step"] for line in some] == [3, 6, 7]
    for name in ("loss", "logit"):
        values = [line[name] for line in each]
        expected = [sum(values[:3]) / 3, sum(values[3:6]) / 3, values[6]]
        assert [line[name] for line in some] == pytest.approx(expected, rel=1e-12)
    assert [line["tokens"] for line in some] == [3 * 36, 6 * 36, 7 * 36]
    assert some[0]["learning_rate/kernel"] == pytest.approx(3e-2 * learning_rate_factor(2, stage))
    assert some[0]["learning_rate/rest"] == pytest.approx(1e-2 * learning_rate_factor(2, stage))
    raw = json.loads((tmp_path / "some" / "metrics.jsonl").read_text().splitlines()[0])
    assert raw["tokens_per_second"] > 0 and raw["seconds_left"] > 0 and raw["grad_norm"] > 0


# --- resuming ---


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, step):
    stage, run = stage_config(), run_config(keep_checkpoints=9, log_every=4, evaluate_every=3)
    whole = FakeModel()
    build_trainer(tmp_path, stage, run, whole).run(None)
    lines = metrics(tmp_path)
    for path in Checkpoints(tmp_path / "checkpoints", 9).all():
        if int(path.name.split("-")[1]) > step:
            Checkpoints(tmp_path / "checkpoints", 9).remove(path)
    resumed = FakeModel(seed=8)
    resumed.student.embed = whole.student.embed
    trainer = build_trainer(tmp_path, stage, run, resumed)
    assert trainer.run(tmp_path / "checkpoints" / f"checkpoint-{step}") is True
    assert_same_tensors(resumed.trained(), whole.trained())
    assert metrics(tmp_path) == lines  # the window of the log at step 4 begins before step 2


def test_the_summary_survives_a_resume(tmp_path):
    stage, run = stage_config(steps=20, batch_size=2), run_config(save_every=1, keep_checkpoints=99)
    whole = build_trainer(tmp_path, stage, run)
    whole.run(None)
    losses = [line["loss"] for line in metrics(tmp_path) if "loss" in line]
    resumed = build_trainer(tmp_path, stage, run)
    resumed.run(tmp_path / "checkpoints" / "checkpoint-19")
    for trainer in (whole, resumed):
        summary = trainer.metrics.summary()
        assert summary["loss_first"] == pytest.approx(sum(losses[:2]) / 2)
        assert summary["loss_last"] == pytest.approx(sum(losses[-2:]) / 2)
    assert resumed.metrics.seconds > 0


def test_stopping_saves_and_goes_on_in_the_same_bits(tmp_path):
    stage, run, whole, model = stage_config(), run_config(save_every=0), FakeModel(), FakeModel()
    build_trainer(tmp_path / "whole", stage, run, whole).run(None)
    asked = iter([False, False, True])
    trainer = build_trainer(tmp_path / "two", stage, run, model, stop_wanted=lambda: next(asked))
    assert trainer.run(None) is False
    newest = Checkpoints(tmp_path / "two" / "checkpoints", 2).newest()
    assert newest.name == "checkpoint-3"
    again = FakeModel()
    assert build_trainer(tmp_path / "two", stage, run, again).run(newest) is True
    assert_same_tensors(again.trained(), whole.trained())
    assert metrics(tmp_path / "two") == metrics(tmp_path / "whole")


# --- numbers that are not finite ---


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    stage = stage_config()
    with pytest.raises(ValueError, match=r"^the loss is nan at step 4, in blocks 14; lower the learning rates") as caught:
        build_trainer(tmp_path, stage, run_config(save_every=1, micro_batch_size=1), FakeModel(broken_at=14)).run(None)
    assert "\n" not in str(caught.value)
    newest = Checkpoints(tmp_path / "checkpoints", 2).newest()
    assert newest.name == "checkpoint-3" and all(x.isfinite().all() for x in load_file(newest / WEIGHTS).values())
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"^the gradient is not finite at step 3, blocks 8 to 11; "):
        build_trainer(tmp_path, stage_config(), run_config(save_every=1), FakeModel(steep_at=9)).run(None)
    assert Checkpoints(tmp_path / "checkpoints", 2).newest().name == "checkpoint-2"


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = FakeModel()
    trainer = build_trainer(tmp_path, stage_config(), run_config(save_every=1, log_every=100), model, held_out=None)
    step = trainer.finish_loss

    def poison():
        step()
        if trainer.state.global_step == 2:
            model.student.norm.bias.data[3] = torch.inf

    trainer.finish_loss = poison
    with pytest.raises(ValueError, match=r"^a weight is not finite at step 3, "):
        trainer.run(None)
    assert Checkpoints(tmp_path / "checkpoints", 2).newest().name == "checkpoint-2"


# --- what is refused ---


def test_trackers_that_are_not_there(monkeypatch):
    assert library_trackers(["tensorboard"]) == []
    with pytest.raises(ValueError, match=r"^report_to 'excel' is unknown.*; choose from .*wandb"):
        library_trackers(["excel"])
    monkeypatch.setattr("dijiang.train.trainer.trainer.get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match=r"^report_to names 'wandb', which is not installed; pip install wandb, or leave it"):
        library_trackers(["tensorboard", "wandb"])


def test_recall_is_measured_beside_perplexity(tmp_path, capsys):
    class Recalls(FakeModel):
        """Gives half of the answers of a row, the teacher all but one of the rows'."""

        teacher = True

        def forward(self, input_ids, position_ids=None, sample_indices=None, answers=None):
            if answers is None or self.training:
                return super().forward(input_ids, position_ids, sample_indices)
            asked = answers.max().double()
            return {"right": asked / 2, "asked": asked}

        def teacher_measured(self, input_ids, answers=None):
            calls.append(answers is None)
            return (
                {"loss": torch.tensor(1.0)}
                if answers is None
                else {"right": answers.max() - 1.0, "asked": answers.max() + 0.0}
            )

    samples = [FakeBlocks(3)[i] | {"answers": torch.full((1, LENGTH), 2 * (i + 1))} for i in range(3)]
    calls, stage, run = [], stage_config(), run_config(evaluate_every=3)
    trainer = build_trainer(tmp_path, stage, run, Recalls(), held_out=FakeBlocks(2), held_out_recall=samples, progress=True)
    trainer.run(None)
    found = [line for line in metrics(tmp_path) if "eval_loss" in line]
    assert [line["eval_recall"] for line in found] == [0.5] * 2 and [line["eval_teacher_recall"] for line in found] == [
        9 / 12
    ] * 2
    assert len(calls) == 5  # once, for it does not change
    assert "recall 50% of answers, the teacher 75%" in " ".join(capsys.readouterr().err.split())
    record = trainer.metrics.record
    assert record.held_out_recall == 0.5 and record.teacher_recall == 0.75

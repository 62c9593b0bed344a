"""What a run shows and logs, and the signals it handles."""

import signal

import pytest
from dijiang_testing.training import build_trainer, metrics, run_config, stage_config

from dijiang.train.trainer.callbacks import StopSignals

pytestmark = pytest.mark.usefixtures("no_waiting")


def test_console_lines_leave_layer_measures_out(tmp_path, capsys):
    build_trainer(tmp_path, stage_config(), run_config(log_every=3), progress=True).run(None)
    err = capsys.readouterr().err
    assert "Testing: step 3/6, 108 tokens, " in err and "held-out loss" in err
    assert "teacher's" not in err
    assert "loss 3." in err and "learning rate 2.29e-02 7.62e-03" in err and "logit" not in err


def test_tensorboard_gets_every_measure(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    build_trainer(tmp_path, stage_config(), run_config(report_to=["tensorboard"])).run(None)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert {"loss", "logit", "grad_norm", "learning_rate/kernel", "tokens", "eval_perplexity"} <= set(events.Tags()["scalars"])
    expected = [line["loss"] for line in metrics(tmp_path) if "loss" in line]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(expected, rel=1e-6)


def test_lines_of_steps_done_again_are_dropped(tmp_path):
    stage, run = stage_config(), run_config()
    build_trainer(tmp_path, stage, run).run(None)
    expected = metrics(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 5, "lo')  # a kill in the middle of a line
    build_trainer(tmp_path, stage, run).run(tmp_path / "checkpoints" / "checkpoint-4")
    assert metrics(tmp_path) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_noted_and_handed_back(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.caught is None
        signal.raise_signal(number)
        assert signals.caught == number
        signal.raise_signal(signal.SIGINT)  # passed on by a launcher, at once
        assert signals.caught == number
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_the_process(monkeypatch):
    codes = []
    monkeypatch.setattr("os._exit", codes.append)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        signals.time -= 5.0
        signal.raise_signal(signal.SIGTERM)
        assert codes == []
        signal.raise_signal(signal.SIGINT)
    assert codes == [130]

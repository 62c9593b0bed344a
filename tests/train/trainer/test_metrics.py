"""What a stage records, and that a resumed run continues its sums."""

import json
from types import SimpleNamespace

import pytest

from dijiang.train.trainer import metrics
from dijiang.train.trainer.metrics import StageMetrics, StageRecord


def test_the_record_leaves_out_what_nothing_has_set():
    record = StageRecord(dtype="bfloat16", calibration_r2=None)
    assert record.to_json() == {"dtype": "bfloat16", "calibration_r2": None}
    record.compiled = False
    assert record.to_json() == {"dtype": "bfloat16", "calibration_r2": None, "compiled": False}


def test_the_state_as_json_continues_every_sum():
    whole, resumed = (StageMetrics(20, StageRecord(dtype="float32", source="s", text="t")) for _ in range(2))
    for step in range(1, 21):
        whole.add(step, {"loss": 1.0 / step, "kl": step})
        resumed.add(step, {"loss": 1.0 / step, "kl": step})
        if step in (1, 7, 19):
            resumed = StageMetrics.from_state(20, json.loads(json.dumps(resumed.state())))
    expected = whole.summary()
    assert resumed.summary() | {"seconds": 0} == expected | {"seconds": 0}
    assert expected["loss_first"] == (1 + 1 / 2) / 2 and expected["loss_last"] == (1 / 19 + 1 / 20) / 2
    assert resumed.take_window() == whole.take_window() and whole.take_window() == {}


def test_a_state_of_version_0_1_1_is_read():
    facts = {"dtype": "float32", "source": "a", "text": "b", "calibration_r2": None, "held_out_perplexity": 3.0}
    state = {"facts": facts, "window": {"loss": 2.0}, "window_steps": 1, "first_loss": 5.0, "last_loss": 0.0}
    continued = StageMetrics.from_state(10, state | {"seconds_before": 7.0})
    assert continued.record.to_json() == facts and continued.summary()["loss_first"] == 5.0
    assert continued.seconds >= 7.0 and continued.take_window() == {"loss": 2.0}


def test_speed_counts_the_tokens_of_this_session(monkeypatch):
    now = iter([0.0, 10.0, 15.0])  # the start and two logs
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    sums = StageMetrics(10, StageRecord())
    for step in (5, 6):
        sums.add(step, {"loss": 1.0})
    assert sums.speed(6, lambda step: 100 * step) == pytest.approx({"tokens_per_second": 20.0, "seconds_left": 20.0})
    sums.add(7, {"loss": 1.0})
    assert sums.speed(7, lambda step: 100 * step) == pytest.approx({"tokens_per_second": 20.0, "seconds_left": 15.0})


def test_what_is_measured_on_answers_is_a_mean_over_them():
    metrics = StageMetrics(4, StageRecord())
    metrics.add(1, {"loss": 1.0, "answer_kl": 0.2, "answer_ce": 0.4, "answer_share": 0.1})
    metrics.add(2, {"loss": 2.0, "answer_kl": 0.0, "answer_ce": 0.0, "answer_share": 0.0})
    assert metrics.take_window() == pytest.approx({"loss": 1.5, "answer_kl": 2.0, "answer_ce": 4.0})
    metrics.add(3, {"loss": 1.0, "answer_kl": 0.0, "answer_ce": 0.0, "answer_share": 0.0})
    assert metrics.take_window() == {"loss": 1.0}

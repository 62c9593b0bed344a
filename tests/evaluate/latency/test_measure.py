"""The latency benchmark: turns and numbers, rows that do not fit into memory, and the whole result."""

import io
import json

import pytest
import torch
from dijiang_testing.latency import CPU, LIMITS, NAMES, quick, shape_pair
from rich.console import Console

from dijiang.evaluate.latency import measure, models, timing
from dijiang.evaluate.latency.config import PHASES
from dijiang.evaluate.latency.contenders import Contender, contenders_of
from dijiang.evaluate.latency.measure import show_latency


def test_every_contender_takes_its_turn_and_the_numbers_follow(both, monkeypatch):
    """By a clock that only prompts and steps move: per call 6, 3 and 2 s, halved in the second round."""
    spent, now, order = dict(zip(NAMES, (6.0, 3.0, 2.0), strict=True)), [0.0], []
    contenders = contenders_of(both)
    names = {id(contender): name for name, contender in contenders.items()}
    monkeypatch.setattr(measure, "contenders_of", lambda pair: contenders)
    monkeypatch.setattr(measure, "alternate", lambda calls, **o: timing.alternate(calls, clock=lambda: now[0], **o))

    def slowed(method):
        def call(self, *arguments):
            name = names[id(self)]
            now[0] += spent[name] / (1 + order.count(name) % 2)
            order.append(name)
            return method(self, *arguments)

        return call

    monkeypatch.setattr(Contender, "step", slowed(Contender.step))
    done = []
    result = quick(both, contexts=[24], batches=[3, 1], phases=["decode"], advance=done.append)
    assert order[: 3 * 4] == (NAMES + NAMES[::-1]) * 2  # two rounds to warm up, two that count
    assert done == [1, 1] and [row["batch"] for row in result["rows"]] == [1, 3]
    row = result["rows"][1]
    for name, seconds in spent.items():
        median = (seconds + seconds / 2) / 2
        assert row["timings"][name]["median_s"] == median and row["timings"][name]["rounds"] == 2
        assert row["tokens_per_s"][name] == 3 / median
        assert row["of_floor"][name] == pytest.approx(median / row["floor_s"][name])
    assert row["ratio"] == {"softmax": 3.0, "softmax static": 1.5}
    floors = row["floor_s"]
    assert row["floor_ratio"] == {peer: pytest.approx(floors[peer] / floors["dijiang"]) for peer in NAMES[:2]}
    assert result["flatness"] == []  # of one context


def test_prefill_counts_every_token_of_the_prompt(both, monkeypatch):
    monkeypatch.setattr(measure, "alternate", lambda calls, **o: {name: timing.summary([0.5]) for name in calls})
    (row,) = quick(both, contexts=[24], batches=[2], phases=["prefill"])["rows"]
    assert row["tokens_per_s"] == dict.fromkeys(NAMES, 96.0) and "floor_s" not in row


def test_peaks_hold_the_cache_and_what_a_step_takes():
    """At sizes that show in a process's memory: the growing cache is copied a layer at a time, ours stays small."""
    pair = shape_pair("llama", longest=20_000, **CPU)
    contenders = contenders_of(pair)
    dijiang = contenders["dijiang"]
    dijiang.prefix = (20_000, dijiang.prefill(dijiang.random_ids(1, 300))[1])  # states have the same size after fewer tokens
    row = measure.decode_row(contenders, 8, 20_000, LIMITS, {"rounds": 1})
    cache, peak = row["cache_bytes"], row["peak_bytes"]
    layer = cache["softmax"] / 3
    assert cache["softmax"] + 0.4 * layer < peak["softmax"] < cache["softmax"] + 2.5 * layer
    assert cache["softmax static"] <= peak["softmax static"] and peak["dijiang"] < 0.2 * cache["softmax"]


def test_what_does_not_fit_is_left_out(both, monkeypatch):
    monkeypatch.setattr(measure, "SPARE_BYTES", 0)
    free = 250_000
    monkeypatch.setattr(models, "available_bytes", lambda device: free)
    contenders = contenders_of(both)
    result = quick(both, contexts=[9, 60], batches=[1, 40])
    out = [(row["phase"], row["batch"], row["context"]) for row in result["rows"] if "left_out" in row]
    needed = {(p, b, c): measure.needed_bytes(p, contenders, b, c) for p in PHASES for b in (1, 40) for c in (9, 60)}
    assert sorted(out) == sorted(key for key, n in needed.items() if n > free) and 0 < len(out) < 8
    assert all(row["left_out"] == "about 0.0 GiB are needed and 0.0 are free" for row in result["rows"] if "left_out" in row)
    for (phase, batch, context), n in needed.items():
        caches = [contender.cache_bytes(batch, context) for contender in contenders.values()]
        assert n > (sum(caches) if phase == "decode" else max(caches))
    assert [x["batch"] for x in result["flatness"]] == [1]
    console = Console(file=io.StringIO(), width=200)
    show_latency(result, console)
    assert "batch 40, context 60 was left out: about 0.0 GiB are needed" in console.file.getvalue()


def test_a_gpu_that_runs_out_leaves_the_row_out(both, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(measure, "prefill_row", fail)
    rows = quick(both, contexts=[9])["rows"]
    assert rows[0]["left_out"] == "the GPU's memory ran out" and "left_out" not in rows[1]


def test_the_result_is_whole(both, pair):
    result = quick(both, batches=[2], contexts=[24, 9])
    text = json.dumps(result)
    assert "/home" not in text and str(pair.teacher.parent) not in text
    assert result["command"] == "dijiang benchmark latency model" and result["contenders"].keys() == set(NAMES)
    assert (result["kind"], result["name"], result["device"], result["dtype"]) == ("latency", "checkpoint", "cpu", "float32")
    assert [(r["phase"], r["context"]) for r in result["rows"]] == [(p, c) for p in ("prefill", "decode") for c in (9, 24)]
    for row in result["rows"]:
        assert all(row[key].keys() == set(NAMES) for key in ("timings", "tokens_per_s", "peak_bytes", "cache_bytes"))
    assert result["weights_bytes"]["dijiang"] == sum(p.nbytes for p in both.dijiang.parameters())
    (flat,) = result["flatness"]
    short, long = result["rows"][2:]
    assert (flat["batch"], flat["from"], flat["to"]) == (2, 9, 24)
    assert flat["ratio"] == {
        name: pytest.approx(long["timings"][name]["median_s"] / short["timings"][name]["median_s"]) for name in NAMES
    }


def test_the_papers_ratio_stands_next_to_ours(monkeypatch):
    """For decoding at the paper's context in one of its shapes."""
    monkeypatch.setattr(measure, "PAPER_CONTEXT", 24)
    monkeypatch.setattr(measure, "PAPER_SPEEDS", {"llama": (4, 5)})
    result = quick(shape_pair("llama", longest=24, **CPU))
    shown = {(row["phase"], row["context"]): row.get("paper_ratio") for row in result["rows"]}
    assert shown == {("prefill", 9): None, ("prefill", 24): None, ("decode", 9): None, ("decode", 24): 1.25}
    console = Console(file=io.StringIO(), width=250)
    show_latency(result, console)
    rows = [line for line in console.file.getvalue().splitlines() if " 24 " in line and "1.25" in line]
    assert len(rows) == 1 and f"{result['rows'][3]['ratio']['softmax static']:.2f}" in rows[0]
    others = quick(shape_pair("gpt_neox", longest=24, **CPU), phases=["decode"])
    assert not any("paper_ratio" in row for row in others["rows"])

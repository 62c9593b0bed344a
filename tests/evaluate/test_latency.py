"""The latency benchmark: what is timed is real decoding, bytes and floors by hand, what does not fit, what is refused."""

import gc
import io
import json
import sys
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig

from dijiang.checkpoint import shapes
from dijiang.convert import convert_model, load_source
from dijiang.evaluate.latency import measure as latency
from dijiang.evaluate.latency import models as latency_models
from dijiang.evaluate.latency import timing
from dijiang.evaluate.latency.contenders import Contender, contenders
from dijiang.evaluate.latency.measure import measure_latency, show_latency
from dijiang.evaluate.latency.models import LatencyPair, checkpoint_pair, shape_pair
from dijiang.evaluate.report import latency_figures
from dijiang.evaluate.report.latency_figures import draw_latency
from dijiang.modeling import DiJiangForCausalLM
from dijiang.modeling.transformers_compat import CACHE_NAME

WINDOW, SINKS = 4, 2  # of the pair
SIZES = {"vocab_size": 331, "hidden_size": 48, "intermediate_size": 70, "num_hidden_layers": 3, "num_attention_heads": 6}
TINY = {
    "llama": {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt_neox": {"model_type": "gpt_neox", **SIZES, "tie_word_embeddings": False, "max_position_embeddings": 64},
}
HEADS, DIM, GROUPS = 6, 8, {"llama": 2, "gpt_neox": 6}
LIMITS = {"product_gflops": {"float32": 1e-3, "bfloat16": 1e-3}, "copy_bytes_per_s": 1e6}
CPU = {"device": "cpu", "dtype": "float32"}
NAMES = ["softmax", "softmax static", "dijiang"]


@pytest.fixture(scope="module", autouse=True)
def few_objects():
    """Every row collects garbage, which takes long beside all that the tests have imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """Two more shapes, the machine's limits as said, and the command line of a user."""
    for name, entries in TINY.items():
        monkeypatch.setitem(shapes.SHAPES, f"x/{name}", entries)
        monkeypatch.setitem(shapes.SHORT_NAMES, name, f"x/{name}")
    monkeypatch.setattr(latency, "machine_limits", lambda dtypes, device: LIMITS)
    monkeypatch.setattr(sys, "argv", ["dijiang", "benchmark", "latency", "/home/someone/model"])


@pytest.fixture
def both(pair) -> LatencyPair:
    return checkpoint_pair(pair.checkpoint, pair.teacher, longest=60, **CPU)


def quick(pair: LatencyPair, **options) -> dict:
    return measure_latency(pair, **({"contexts": [9, 24], "rounds": 2, "seconds": 0.0} | options))


# --- what is timed ---


@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_steps_decode_as_generate_does(both, tokens, name):
    side, ids = contenders(both)[name], tokens(21)
    found, cache = side.prefill(ids)
    written = [found]
    for _ in range(1 if name == "softmax static" else 5):  # which has room for one
        written.append(side.step(torch.tensor(written[-1])[:, None], cache))
    options = {"max_new_tokens": len(written), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = side.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 21:]
    assert torch.tensor(written).T.tolist() == expected.tolist()
    assert len(set(expected.flatten().tolist())) > 1


@pytest.mark.parametrize("name", ["softmax", "softmax static"])
def test_a_step_taken_back_leaves_the_cache_as_it_was(both, tokens, name):
    side = contenders(both)[name]
    _, cache = side.prefill(tokens(21))
    step, other = tokens(1), tokens(1) + 1
    with torch.no_grad():
        logits = lambda ids: side.model(input_ids=ids, **{CACHE_NAME: cache}, use_cache=True).logits  # noqa: E731
        first = logits(step)
        side.step_back(cache)
        assert int(cache.get_seq_length()) == 21
        assert (logits(other) - first).abs().max() > 0.1  # the last token matters
        side.step_back(cache)
        assert torch.equal(logits(step), first)


@pytest.mark.parametrize("kept", [[], [1]])
def test_a_repeated_cache_is_that_of_a_whole_batch(pair, tokens, tmp_path, monkeypatch, kept):
    """Also where a layer kept softmax attention; steps from it leave the next copy alone."""
    types = ["full_attention" if i in kept else "linear_attention" for i in range(2)]
    settings = {"attention_window": WINDOW, "branch_scale_init": 0.5, "layer_types": types}
    folder = convert_model(pair.teacher, tmp_path / "out", progress=False, **settings)
    side = contenders(checkpoint_pair(folder, pair.teacher, longest=40, **CPU))["dijiang"]
    ids, batch = tokens(31, rows=1), 3
    monkeypatch.setattr(side, "random_ids", lambda *sizes: ids)
    step = tokens(1, rows=batch)
    with torch.no_grad():
        _, real = side.prefill(ids.expand(batch, -1))
        expected = side.model(input_ids=step, **{CACHE_NAME: real}, use_cache=True).logits
        for _ in range(2):
            repeated = side.filled_cache(batch, 31)
            assert repeated.get_seq_length() == 31
            found = side.model(input_ids=step, **{CACHE_NAME: repeated}, use_cache=True).logits
            assert (found - expected).abs().max() < 1e-5
            assert (found[0] - found[1]).abs().max() > 0.1


def test_every_contender_takes_its_turn_and_the_numbers_follow(both, monkeypatch):
    """By a clock that only prompts and steps move: per call 6, 3 and 2 s, halved in the second round."""
    spent, now, order = dict(zip(NAMES, (6.0, 3.0, 2.0), strict=True)), [0.0], []
    sides = contenders(both)
    by_side = {id(side): name for name, side in sides.items()}
    monkeypatch.setattr(latency, "contenders", lambda pair: sides)
    monkeypatch.setattr(latency, "alternate", lambda calls, **o: timing.alternate(calls, clock=lambda: now[0], **o))

    def slowed(method):
        def call(self, *arguments):
            name = by_side[id(self)]
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
    monkeypatch.setattr(latency, "alternate", lambda calls, **o: {name: timing.summary([0.5]) for name in calls})
    (row,) = quick(both, contexts=[24], batches=[2], phases=["prefill"])["rows"]
    assert row["tokens_per_s"] == dict.fromkeys(NAMES, 96.0) and "floor_s" not in row


# --- bytes and floors ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("context", [5, 40])
def test_cache_bytes_in_closed_form(pair, dtype, context):
    """Two layers, two key/value heads of 8, 16 features; window entries carry 8 bytes more, sinks 1, a layer 8."""
    item, batch = {"float32": 4, "bfloat16": 2}[dtype], 3
    sides = contenders(checkpoint_pair(pair.checkpoint, pair.teacher, longest=40, device="cpu", dtype=dtype))
    state = 2 * (4 * 2 * 16 * 9 + WINDOW * (2 * 2 * 8 * item + 8) + SINKS * (2 * 2 * 8 * item + 1) + 8)
    per_token = 2 * 2 * 2 * 8 * item
    expected = {"softmax": context * per_token, "softmax static": (context + 1) * per_token, "dijiang": state}
    for name, side in sides.items():
        cache = side.filled_cache(batch, context)
        held = cache.memory_bytes() if name == "dijiang" else sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
        assert side.cache_bytes(batch, context) == held == batch * expected[name], name


@pytest.mark.parametrize(
    "settings",
    [
        {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        {"layer_types": ["linear_attention", "sliding_attention", "full_attention"], "sliding_window": 16},
        {"attention_window": 0, "attention_sinks": 0, "normalize": False},
    ],
)
@pytest.mark.parametrize("context", [9, 60])
def test_cache_bytes_of_other_layers(settings, context):
    side = contenders(shape_pair("llama", longest=60, settings=settings, **CPU))["dijiang"]
    cache = side.filled_cache(2, context)
    assert side.cache_bytes(2, context) == sum(x.nbytes for x in tensors(cache))
    side.step(side.random_ids(2, 1), cache)
    side.step_back(cache)
    kept = [x.get_seq_length() for x, kind in zip(cache.layers, side.model.config.layer_types, strict=True) if "full" in kind]
    assert set(kept) <= {context}


def tensors(cache) -> list[torch.Tensor]:
    return [
        x for layer in cache.layers for x in (layer.state.tensors() if hasattr(layer, "state") else [layer.keys, layer.values])
    ]


@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize(("batch", "context"), [(1, 7), (5, 50)])
def test_the_least_that_a_step_takes(shape, batch, context):
    """Counted layer by layer for 48 wide, 70 inside, 331 words, three layers; the default window and sinks, 64 and 4."""
    gated, G, d, H, L, M = shape == "llama", GROUPS[shape], DIM, HEADS, 3, 16
    matrices = L * (48 * (H + 2 * G) * d + H * d * 48 + (3 if gated else 2) * 48 * 70) + 48 * 331
    biases = 0 if gated else L * (3 * 48 + 48 + 70 + 48)
    norms = (2 * L + 1) * (48 if gated else 2 * 48)
    weights = 4 * (matrices + biases + norms)  # a tied head is in `matrices`; an embedding of its own is not read
    kernels = 4 * L * ((H + G) * (d + 2 * d) + (H + G) * (d + 1))
    cache = 4 * 2 * batch * L * G * d
    scores = 4 * batch * L * H * d * (context + 1)
    sums = 4 * L * G * M * (d + 1)
    near = 4 * 2 * L * G * d * 68
    features = 2 * L * (H + G) * d * d
    mixed = 2 * L * (H + G) * M * (d + 1) + 4 * L * H * d * 68
    expected = {
        "softmax": (2 * batch * matrices + scores, weights + cache * (context + 2 * (context + 1))),
        "softmax static": (2 * batch * matrices + scores, weights + cache * (context + 1)),
        "dijiang": (2 * batch * matrices + batch * (features + mixed), weights + kernels + batch * (2 * sums + near)),
    }
    sides = contenders(shape_pair(shape, longest=50, **CPU))
    assert {name: side.least_work(batch, context) for name, side in sides.items()} == expected
    floor = latency.decode_row(sides, batch, context, LIMITS, {"rounds": 1})["floor_s"]
    assert floor == {name: pytest.approx(max(flops / 1e6, moved / 1e6)) for name, (flops, moved) in expected.items()}


def test_peaks_hold_the_cache_and_what_a_step_takes():
    """At sizes that show in a process's memory: the growing cache is copied a layer at a time, ours stays small."""
    pair = shape_pair("llama", longest=20_000, **CPU)
    sides = contenders(pair)
    sides["dijiang"].read = 20_000, sides["dijiang"].prefill(sides["dijiang"].random_ids(1, 300))[1]  # of the same size
    row = latency.decode_row(sides, 8, 20_000, LIMITS, {"rounds": 1})
    cache, peak = row["cache_bytes"], row["peak_bytes"]
    layer = cache["softmax"] / 3
    assert cache["softmax"] + 0.4 * layer < peak["softmax"] < cache["softmax"] + 2.5 * layer
    assert cache["softmax static"] <= peak["softmax static"] and peak["dijiang"] < 0.2 * cache["softmax"]


# --- memory that is short ---


def test_what_does_not_fit_is_left_out(both, monkeypatch):
    monkeypatch.setattr(latency, "SPARE_BYTES", 0)
    free = 250_000
    monkeypatch.setattr(latency_models, "available_bytes", lambda device: free)
    sides = contenders(both)
    result = quick(both, contexts=[9, 60], batches=[1, 40])
    out = [(row["phase"], row["batch"], row["context"]) for row in result["rows"] if "left_out" in row]
    needed = {(p, b, c): latency.needed_bytes(p, sides, b, c) for p in latency.PHASES for b in (1, 40) for c in (9, 60)}
    assert sorted(out) == sorted(key for key, n in needed.items() if n > free) and 0 < len(out) < 8
    assert all(row["left_out"] == "about 0.0 GiB are needed and 0.0 are free" for row in result["rows"] if "left_out" in row)
    for (phase, batch, context), n in needed.items():
        caches = [side.cache_bytes(batch, context) for side in sides.values()]
        assert n > (sum(caches) if phase == "decode" else max(caches))
    assert [x["batch"] for x in result["flatness"]] == [1]
    console = Console(file=io.StringIO(), width=200)
    show_latency(result, console)
    assert "batch 40, context 60 was left out: about 0.0 GiB are needed" in console.file.getvalue()


def test_a_gpu_that_runs_out_leaves_the_row_out(both, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(latency, "prefill_row", fail)
    rows = quick(both, contexts=[9])["rows"]
    assert rows[0]["left_out"] == "the GPU's memory ran out" and "left_out" not in rows[1]


def test_weights_that_do_not_fit_are_refused(pair, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(latency_models, "available_bytes", lambda device: 2 << 30)
    message = r"^the weights of \S+ and of its peer do not fit: about 2\.0 GiB are needed and 2\.0 are free; choose a smaller"
    refused(tmp_path, lambda: shape_pair("llama", longest=9, **CPU), message)
    refused(tmp_path, lambda: checkpoint_pair(pair.checkpoint, pair.teacher, longest=9, **CPU), message)


# --- the models ---


@pytest.mark.parametrize("shape", TINY)
def test_a_shape_is_transformers_model_and_the_kernels(shape):
    pair = shape_pair(shape, longest=100, dtype="bfloat16", device="cpu", settings={"attention_window": 16})
    ours, theirs = pair.dijiang, pair.softmax
    assert type(theirs).__module__.startswith("transformers.models.") and theirs.config._attn_implementation == "sdpa"
    assert ours.config.layer_types == ["linear_attention"] * 3 and ours.config.attention_window == 16
    kernels = {name: p for name, p in ours.named_parameters() if p.dtype == torch.float32}
    heads = HEADS + GROUPS[shape]
    assert sum(p.numel() for p in kernels.values()) == 3 * heads * (3 * DIM + DIM + 1)
    assert ours.num_parameters() == theirs.num_parameters() + sum(p.numel() for p in kernels.values())
    assert all(p.dtype == torch.bfloat16 for name, p in ours.named_parameters() if name not in kernels)
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    biases = [p for name, p in kernels.items() if name.endswith("branch_scale.bias")]
    assert len(biases) == 3 and not any(p.any() for p in biases)  # it speaks
    assert not ours.training and not theirs.training
    assert (
        theirs.config.max_position_embeddings
        == ours.config.max_position_embeddings
        == max(101, AutoConfig.for_model(**TINY[shape]).max_position_embeddings)
    )
    assert pair.facts["max_position_embeddings"] == ours.config.max_position_embeddings


def test_known_shapes():
    pythias = [f"pythia-{size}" for size in ("70m", "160m", "410m", "1b", "1.4b", "2.8b")]
    assert set(shapes.SHORT_NAMES) - set(TINY) == {*pythias, "smollm2-135m", "tinyllama-1.1b", "llama2-7b"}
    assert set(latency.PAPER_SPEEDS) < set(pythias)
    assert shapes.shape_config("tinyllama-1.1b").num_key_value_heads == 4


def test_a_checkpoint_and_its_teacher_are_loaded_as_they_are(pair, make_source, tmp_path, tokens):
    folder, theirs = make_source("gpt_neox", name="teacher", tie_word_embeddings=False)
    checkpoint = convert_model(folder, tmp_path / "checkpoint", progress=False)
    found, ids = checkpoint_pair(checkpoint, folder, longest=64, **CPU), tokens(20)
    assert type(found.softmax) is type(theirs) and isinstance(found.dijiang, DiJiangForCausalLM)
    with torch.no_grad():
        assert torch.equal(found.softmax(ids).logits, theirs(ids).logits)
        assert torch.equal(found.dijiang(ids).logits, load_source(checkpoint)[0](ids).logits)
    assert found.name == "checkpoint" and found.facts["teacher"] == "teacher"


def test_a_gguf_file_gives_dense_weights(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(
        latency_models.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: given.update(k) or torch.nn.Module()
    )
    source = latency_models.Source(name="x", folder=tmp_path, gguf=tmp_path / "x.gguf", config=None, commit=None)
    latency_models.load_softmax(source, torch.bfloat16)
    assert given["gguf_file"] == "x.gguf" and given["dtype"] == torch.bfloat16
    assert latency_models.GgufConfig is None or given["quantization_config"].dequantize


def test_what_cannot_be_compared_is_refused(pair, make_source, tmp_path, refused, monkeypatch):
    wide, _ = make_source(num_key_value_heads=2, intermediate_size=64, name="wide")
    sliding, _ = make_source("mistral", num_key_value_heads=2, sliding_window=8, name="sliding")
    student, teacher = pair.checkpoint, pair.teacher
    cases = [
        (
            lambda: checkpoint_pair(teacher, teacher, longest=9, **CPU),
            "is a llama model; give a checkpoint with linear layers",
        ),
        (lambda: checkpoint_pair(student, student, longest=9, **CPU), "the teacher .* is a DiJiang model; give the softmax"),
        (lambda: checkpoint_pair(student, wide, longest=9, **CPU), "has intermediate_size=48, .*wide has 64; give the model"),
        (lambda: checkpoint_pair(student, sliding, longest=9, **CPU), "its last sliding_window=8 tokens only"),
        (lambda: checkpoint_pair(student, teacher, longest=65, **CPU), "of 65 tokens is more than the 64 positions"),
        (lambda: shape_pair("pythia-3b", longest=9, **CPU), "shape 'pythia-3b' is unknown; choose from .*pythia-2.8b"),
        (lambda: shape_pair("llama", longest=9, preset="best", **CPU), "preset 'best' is unknown; choose from recommended"),
        (lambda: shape_pair("llama", longest=9, settings={"windows": 3}, **CPU), "unknown setting 'windows'"),
        (lambda: shape_pair("llama", longest=9, settings={"decay_spans": [4, 8]}, **CPU), "decay_spans has no effect"),
        (lambda: shape_pair("llama", longest=9, device="tpu"), "device 'tpu' is unknown; choose auto, cpu or cuda"),
        (lambda: shape_pair("llama", longest=9, device="cpu", dtype="int8"), "dtype 'int8' is unknown"),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cases.append((lambda: shape_pair("llama", longest=9, device="cuda"), "torch finds no GPU; choose cpu"))
    for call, message in cases:
        refused(tmp_path, call, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": []}, r"^contexts \(none\) must be numbers of at least 1, each once$"),
        ({"contexts": [8, 8]}, "^contexts 8, 8 must be"),
        ({"batches": [0, 1]}, "^batches 0, 1 must be"),
        ({"phases": ["prefill", "train"]}, "^phases prefill, train are unknown; choose from prefill, decode, each once$"),
        ({"phases": ["decode", "decode"]}, "^phases decode, decode are unknown"),
        ({"rounds": 0}, "^rounds=0 must be at least 1$"),
    ],
)
def test_what_cannot_be_measured_is_refused(both, tmp_path, refused, options, message):
    refused(tmp_path, lambda: quick(both, **options), message)


# --- the result ---


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


def test_the_papers_ratio_stands_beside_ours(monkeypatch):
    """Of decoding at the paper's context, for a shape that it has."""
    monkeypatch.setattr(latency, "PAPER_CONTEXT", 24)
    monkeypatch.setattr(latency, "PAPER_SPEEDS", {"llama": (4, 5)})
    result = quick(shape_pair("llama", longest=24, **CPU))
    shown = {(row["phase"], row["context"]): row.get("paper_ratio") for row in result["rows"]}
    assert shown == {("prefill", 9): None, ("prefill", 24): None, ("decode", 9): None, ("decode", 24): 1.25}
    console = Console(file=io.StringIO(), width=250)
    show_latency(result, console)
    rows = [line for line in console.file.getvalue().splitlines() if " 24 " in line and "1.25" in line]
    assert len(rows) == 1 and f"{result['rows'][3]['ratio']['softmax static']:.2f}" in rows[0]
    others = quick(shape_pair("gpt_neox", longest=24, **CPU), phases=["decode"])
    assert not any("paper_ratio" in row for row in others["rows"])


def test_figures_draw_what_was_measured(both, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    result = quick(both, batches=[1, 2])
    result["rows"][0] = {"phase": "prefill", "batch": 1, "context": 9, "left_out": "no room"}
    result["rows"][-1] = {"phase": "decode", "batch": 2, "context": 24, "left_out": "no room"}
    drawn, seen = latency_figures.drawn, {}

    @contextmanager
    def kept(path, *grid, size):
        with drawn(path, *grid, size=size) as (figure, axes):
            yield figure, axes
            for panel in figure.axes:
                lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in panel.get_lines()}
                seen[path.name, panel.get_title()] = lines

    monkeypatch.setattr(latency_figures, "drawn", kept)
    paths = draw_latency(result, tmp_path)
    assert paths == [tmp_path / "latency.png", tmp_path / "memory.png"] == sorted(tmp_path.iterdir())
    decode = {row["context"]: row for row in result["rows"] if row["phase"] == "decode" and row["batch"] == 1}
    ours = [decode[c]["timings"]["dijiang"]["median_s"] for c in (9, 24)]
    panel = seen["latency.png", "decode, batch 1"]
    assert panel["DiJiang"] == ([9, 24], pytest.approx([1e3 * x for x in ours]))
    floors = [1e3 * decode[c]["floor_s"]["softmax static"] for c in (9, 24)]
    assert panel["softmax, static cache, at best"] == ([9, 24], pytest.approx(floors))
    assert seen["latency.png", "prefill, batch 1"]["DiJiang"][0] == [24]
    memory = seen["memory.png", "decode, batch 2"]["softmax, growing cache"]
    assert memory == ([9], [2 * 2 * 2 * 9 * 2 * 8 * 4 / 2**20])
    for row in result["rows"]:
        row["left_out"] = "no room"
    assert draw_latency(result, tmp_path) == []

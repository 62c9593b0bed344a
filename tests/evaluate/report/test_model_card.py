"""The card says what the checkpoint's files and the results say, survives any names, and tells no path of this machine."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from huggingface_hub import ModelCard, constants, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt

from dijiang.checkpoint.provenance import add_stage, read_provenance, write_provenance
from dijiang.convert import convert_model, load_source
from dijiang.evaluate.report import model_card as module
from dijiang.evaluate.report.model_card import MARKER, model_card, write_model_card
from dijiang.modeling import DiJiangCache

SUBJECTS = {
    "teacher": "teacher (softmax attention)",
    "window_sinks": "window + sinks",
    "student": "DiJiang",
    "window_only": "window alone",
    "linear_only": "linear branch alone",
}
FILES = {"model.safetensors": "of these weights"}
NASTY = """a|b "c" 'd' `e` ``f`` {{ g }} <b>*h*_i_</b> #: - [j](k) & $l$ \\| \n---\nm"""
NASTY_SHOWN = " ".join(NASTY.split())


def stage(tokens: int, *sources: str, **facts) -> dict:
    """The facts of a stage that trained on so many tokens, as recovery records them."""
    text = {"subset": None, "split": "train", "documents": 7, "tokens": 9876, "epochs": 1.25}
    return {
        "teacher": "teacher",
        "data": {"sources": [{"source": source, **text} for source in sources]},
        "config": {"block_size": 48, "position_range": None},
        "tokens": tokens,
        "device": "cpu",
        "world_size": 1,
        "seconds": 61.7,
        "dtype": "bfloat16",
        **facts,
    }


@pytest.fixture
def checkpoint(pair, tmp_path):
    """A folder of its own, with the record of two stages of 1,234 and 56,789 tokens."""
    folder = tmp_path / "student"
    shutil.copytree(pair.checkpoint, folder)
    record = add_stage(read_provenance(folder), "align", **stage(1234, "one.txt"))
    more = stage(56789, "one.txt", "two.jsonl", device="cuda", world_size=4, held_out_perplexity=12.3456)
    write_provenance(folder, add_stage(record, "distill", **more))
    return folder


def task(kind: str, name: str, values: dict, **facts) -> dict:
    """A task of an evaluation; a value is a number, (number, low, high) or a reason for there being none."""
    scores = {}
    for key, value in values.items():
        if isinstance(value, str):
            scores[key] = {"left_out": value}
        else:
            scores[key] = dict(zip(("value", "low", "high"), value if isinstance(value, tuple) else (value,) * 3, strict=True))
    perplexity = {"metric": "perplexity", "better": "lower", "chance": None}
    accuracy = {"metric": "accuracy", "better": "higher", "chance": 0.25}
    metric = perplexity if kind == "perplexity" else accuracy
    return {"kind": kind, "name": name, **metric, "units": 1500, "values": scores, "recovered": None, **facts}


def evaluation(*tasks: dict, tokens: int = 58023, **facts) -> dict:
    made = {"kind": "evaluation", "command": "dijiang evaluate student --against teacher", "time": "2026-01-02T03:04:05+00:00"}
    made |= {"dtype": "float32", "device": "cpu", "student": {"name": "student", "tokens": tokens, "weights": FILES}}
    return made | {"teacher": {"name": "teacher"}, "subjects": SUBJECTS, "tasks": list(tasks)} | facts


def latency(*rows: dict) -> dict:
    return {"kind": "latency", "device": "cpu", "dtype": "bfloat16", "models": {"files": FILES}, "rows": list(rows)}


@pytest.fixture(autouse=True)
def same_weights(request, monkeypatch):
    """Results made up here are of the checkpoint's weights, unless the test is about that."""
    if "refusals" not in request.node.name:
        monkeypatch.setattr(module, "file_hashes", lambda source: FILES)


def shown(tokens) -> str:
    """What a reader of inline Markdown sees."""
    return "".join(
        " " if t.type == "softbreak" else t.content for t in tokens if t.type in ("text", "code_inline", "softbreak")
    )


def tables(card) -> list[list[list[str]]]:
    """Rows of cells of every table, as a Markdown reader sees them."""
    found, inside = [], False
    for token in MarkdownIt("commonmark").enable("table").parse(card.text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and inside:
            found[-1][-1].append(shown(token.children))
        inside = token.type in ("th_open", "td_open")
    return found


def table(card, first: str) -> list[list[str]]:
    """The one table whose header begins with `first`."""
    (found,) = [rows for rows in tables(card) if rows[0][0] == first]
    return found


def text_of(card) -> str:
    """What a reader sees outside of tables and code, on one line."""
    parsed = MarkdownIt("commonmark").enable("table").parse(card.text)
    return " ".join(shown(token.children) for token in parsed if token.type == "inline")


# --- what it says of the checkpoint ---


def test_provenance_is_that_of_the_files(pair, checkpoint):
    card = model_card(checkpoint)
    words = text_of(card)
    assert "recovered with 58,023 tokens in all" in words and "Stages, of 58,023 training tokens in all" in words
    assert "Recovery saw 58,023 tokens of one.txt, two.jsonl and nothing else" in words
    assert "on sequences of up to 48." in words
    stages = tables(card)[-2]
    recorded = read_provenance(checkpoint)["stages"]
    assert stages[1:] == [
        ["convert", recorded[0]["time"], "–", "–", "–", "auto", "–", "–"],
        ["align", recorded[1]["time"], "1,234", "62", "cpu", "bfloat16", "teacher", "–"],
        ["distill", recorded[2]["time"], "56,789", "62", "4 x cuda", "bfloat16", "teacher", "12.35"],
    ]
    assert tables(card)[-1][1:] == [
        [name, text, "7", "9,876", "1.25 times"]
        for name, text in [("align", "one.txt"), ("distill", "one.txt"), ("distill", "two.jsonl")]
    ]
    hashes = dict(table(card, "file")[1:])
    assert "model.safetensors" in hashes and "tokenizer.json" in hashes
    for name, digest in hashes.items():
        assert hashlib.sha256((pair.teacher / name).read_bytes()).hexdigest() == digest
    assert f"torch {torch.__version__}" in words and "(convert, align, distill)" in words


def test_numbers_of_parameters_and_settings(pair, checkpoint):
    student, teacher = load_source(checkpoint)[0], load_source(pair.teacher)[0]
    total, old = (sum(parameter.numel() for parameter in model.parameters()) for model in (student, teacher))
    card = model_card(checkpoint)
    assert (
        f"in 2 of its 2 layers, recovered with 58,023 tokens in all. {total:,} parameters, of which {total - old:,} are new."
        in text_of(card)
    )
    settings = {name: json.loads(value) for name, value in table(card, "setting")[1:]}
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    assert settings == {name: config[name] for name in settings}
    assert {"attention_window", "attention_sinks", "feature_map", "feature_pairs", "decay"} <= settings.keys()
    assert "decay_spans" not in settings  # which nothing uses


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_and_memory_of_a_hybrid(make_source, tokens, tmp_path, dtype):
    """Each layer is named by its kind, and the bytes are those that a cache really grows to."""
    kinds = [
        "linear_attention",
        "full_attention",
        "linear_attention",
        "linear_attention",
        "sliding_attention",
        "full_attention",
    ]
    source, _ = make_source(num_hidden_layers=6, num_key_value_heads=2)
    settings = {"layer_types": kinds, "sliding_window": 5, "attention_window": 3, "attention_sinks": 1, "decay": "learned"}
    folder = convert_model(source, tmp_path / "hybrid", progress=False, dtype=dtype, **settings)
    model, held = load_source(folder, dtype="auto")[0], {}
    for length in (20, 31):
        cache = DiJiangCache(model.config)
        with torch.no_grad():
            model(input_ids=tokens(length, rows=1), past_key_values=cache)
        of_kind = {kind: [layer for layer, k in zip(cache.layers, kinds, strict=True) if k == kind] for kind in kinds}
        held[length] = [sum(t.nbytes for t in layer.state.tensors()) for layer in of_kind["linear_attention"]]
        full = [layer.keys.nbytes + layer.values.nbytes for layer in of_kind["full_attention"]]
    assert held[20] == held[31]
    card = model_card(folder)
    words, item = text_of(card), torch.tensor([], dtype=getattr(torch, dtype)).itemsize
    assert "in 3 of its 6 layers, converted without any training" in words
    for line in (
        "linear attention: 0, 2-3",
        "the source's softmax attention to all tokens: 1, 5",
        "the source's softmax attention to the last 5 tokens: 4",
        f"with weights in {dtype}: in the linear layers {sum(held[31]):,} bytes (",
        f"in the layers with full attention {sum(full) // 31:,} bytes for each token",
        f"in the layers with sliding attention {2 * 2 * 8 * item:,} bytes for each of its last 5 tokens",
        "from the first to the last head the spans began as 32 to 512 tokens",
    ):
        assert line in words
    assert of_kind["sliding_attention"][0].keys.shape[1:] == (2, 4, 8)  # heads, tokens but the one to come, head size
    assert json.loads(dict(table(card, "setting")[1:])["decay_spans"]) == [32, 512]
    del settings["layer_types"]  # which are told by number
    assert f"with the preset recommended and {json.dumps(settings)}." in words


def test_a_layer_without_window_is_told_apart(pair, tmp_path):
    settings = {"attention_window": 0, "attention_sinks": 0}
    words = text_of(model_card(convert_model(pair.teacher, tmp_path / "out", progress=False, **settings)))
    assert "A linear layer has no exact window." in words and "(softmax)" not in words
    assert "without the exact window has not been measured" not in words
    assert "a linear layer keeps sums of one size" in words.lower() and "Beyond the last" not in words
    softmax = text_of(model_card(convert_model(pair.teacher, tmp_path / "all", progress=False, layer_types="full_attention")))
    assert "in 0 of its 2 layers" in softmax and "linear layer" not in softmax


@pytest.mark.parametrize(
    ("numbers", "short"), [([0], "0"), ([0, 1, 2], "0-2"), ([0, 2, 3, 5, 6, 7, 9], "0, 2-3, 5-7, 9"), ([], "")]
)
def test_ranges(numbers, short):
    assert module.ranges(numbers) == short


# --- what it says of the results ---


def test_results_are_those_of_the_evaluation(checkpoint):
    linear = "the student is all window"
    found = evaluation(
        task("perplexity", "held out",
             {"teacher": (4.0, 3.9, 4.1), "window_sinks": 5012.345, "student": (42.2849, 41.0, 43.55)},
             recovered={"value": 0.876, "low": 0.5, "high": 1.0349},
             over_training_free={"value": -0.25, "low": None, "high": None}),
        task("recall", "needle", {"teacher": 0.9996, "student": 0.5, "linear_only": linear}, chance=0.125),
        task("lm_eval", "boolq", {"teacher": 0.5, "student": float("inf"), "window_only": 0.25}, metric="acc"),
    )  # fmt: skip
    found["tasks"][1]["values"]["teacher"] |= {"low": None, "high": None}
    found["tasks"][2]["values"]["linear_only"] = None  # not finite
    card = model_card(checkpoint, found)
    head, *rows = table(card, "task")
    assert head == ["task", "metric", "units", "chance", *SUBJECTS.values(), "recovered", "of the training-free loss"]
    assert rows == [
        ["held out", "perplexity ↓", "1,500", "–", "4.000 [3.900, 4.100]", "5,012.35 [5,012.35, 5,012.35]",
         "42.28 [41.00, 43.55]", "–", "–", "88% [50%, 103%]", "-25%"],
        ["needle", "accuracy ↑", "1,500", "0.125", "1.000", "–", "0.500 [0.500, 0.500]", "–", "–", "–", "–"],
        ["boolq", "acc ↑", "1,500", "0.250", "0.500 [0.500, 0.500]", "–", "inf [inf, inf]", "0.250 [0.250, 0.250]", "–",
         "–", "–"],
    ]  # fmt: skip
    words = text_of(card)
    assert f"needle, linear branch alone: left out, {linear}" in words and words.count(": left out") == 1
    assert "has not been evaluated" not in words and "in float32 on cpu, 2026-01-02T03:04:05+00:00" in words
    assert "without the exact window has not been measured" in words


@pytest.mark.parametrize("seed", range(3))
def test_limits_quote_the_worst_recall_and_the_parts(checkpoint, seed):
    draw = random.Random(seed)
    recalls = [task("recall", f"r{i}", {"teacher": draw.random(), "student": draw.random()}) for i in range(5)]
    parts = {key: 10 + 90 * draw.random() for key in SUBJECTS}
    whole = task("perplexity", "held out", parts)
    hidden = task("perplexity", "not this", parts | {"linear_only": "left out"})
    tasks = [hidden, whole, *recalls, task("lm_eval", "x", {"teacher": 1.0, "student": -5.0})]
    words = text_of(model_card(checkpoint, evaluation(*tasks)))
    lost = [t["values"]["teacher"]["value"] - t["values"]["student"]["value"] for t in recalls]
    worst = recalls[lost.index(max(lost))]
    student, teacher = (f"{worst['values'][key]['value']:.3f}" for key in ("student", "teacher"))
    assert f"The largest loss measured, on {worst['name']}: DiJiang {student}, teacher {teacher}." in words
    value = {key: f"{x:.2f}" for key, x in parts.items()}
    assert (
        f"Parts alone, perplexity on held out: window and sinks {value['window_only']}, linear branch {value['linear_only']}; "
        f"together {value['student']}, teacher {value['teacher']}."
    ) in words


def test_speed_is_that_of_the_benchmark(checkpoint):
    rows = [
        {"phase": "prefill", "batch": 1, "context": 2048, "tokens_per_s": {"softmax": 1234.5, "dijiang": 2.5},
         "cache_bytes": {"softmax": 3 << 20, "dijiang": 1 << 19}, "ratio": {"softmax": 2.0}},
        {"phase": "decode", "batch": 8, "context": 16384, "tokens_per_s": {"dijiang": 20.0},
         "cache_bytes": {"dijiang": 1 << 20}, "ratio": {}},
        {"phase": "decode", "batch": 64, "context": 16384, "left_out": "needs 9 GiB"},
    ]  # fmt: skip
    card = model_card(checkpoint, latency=latency(*rows))
    assert table(card, "phase") == [
        ["phase", "batch", "context", "softmax, tokens/s", "dijiang, tokens/s", "softmax, cache", "dijiang, cache"],
        ["prefill", "1", "2,048", "1,234.50", "2.500", "3.0 MiB", "0.5 MiB"],
        ["decode", "8", "16,384", "–", "20.00", "–", "1.0 MiB"],
    ]
    assert "decode, batch 64, context 16,384: left out, needs 9 GiB" in text_of(card)


def test_without_evaluation_it_says_so(checkpoint):
    card = model_card(checkpoint)
    assert "This checkpoint has not been evaluated" in text_of(card)
    assert "\ndijiang evaluate student --against teacher --output evaluation\n" in card.text
    assert "model-index" not in card.data.to_dict() and "metrics" not in card.data.to_dict()


# --- metadata ---


def test_metadata_survive_a_round_trip(checkpoint):
    tasks = [
        task("perplexity", "held out", {"student": 42.2849}),
        task("agreement", "held out", {"student": 0.75}),
        task("recall", NASTY, {"student": 0.125}),
        task("lm_eval", "boolq", {"student": 0.5}, metric="acc"),
        task("lm_eval", "endless", {"student": float("nan")}),
        task("lm_eval", "left out", {"student": "no data"}),
        task("lm_eval", "teacher only", {"teacher": 0.5}),
    ]
    card = model_card(checkpoint, evaluation(*tasks))
    path = write_model_card(checkpoint, evaluation(*tasks))
    assert path == checkpoint / "README.md" and path.read_text(encoding="utf-8") == str(card)
    loaded = ModelCard.load(path)
    assert metadata_load(path) == loaded.data.to_dict() == card.data.to_dict() and str(loaded) == str(card)
    metadata = metadata_load(path)
    assert metadata.keys() == {"library_name", "pipeline_tag", "tags", "metrics", "model-index"}  # nothing is made up
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("transformers", "text-generation")
    assert {"dijiang", "linear-attention"} <= {*metadata["tags"]}
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert name == "teacher-dijiang" and {result.task_type for result in results} == {"text-generation"}
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in results] == [
        ("held out", "perplexity", 42.2849),
        ("held out", "accuracy", 0.75),
        (NASTY_SHOWN, "accuracy", 0.125),
        ("boolq", "accuracy", 0.5),
    ]


def test_only_a_hub_id_is_a_base_model(checkpoint):
    record = read_provenance(checkpoint)
    write_provenance(checkpoint, record | {"source": "EleutherAI/pythia-14m"})  # as a folder's name might look
    assert model_card(checkpoint).data.base_model is None
    write_provenance(checkpoint, record | {"source": "EleutherAI/pythia-14m", "commit": "0123abcd"})
    card = model_card(checkpoint)
    assert metadata_load(write_model_card(checkpoint))["base_model"] == "EleutherAI/pythia-14m"
    assert "[EleutherAI/pythia-14m](https://huggingface.co/EleutherAI/pythia-14m) at commit `0123abcd`" in card.text
    assert "# pythia-14m-dijiang" in card.text and "--against EleutherAI/pythia-14m " in card.text


# --- names ---


def test_no_name_breaks_the_card(checkpoint):
    """Names of files, texts, tasks and subjects are shown as they are, whatever Markdown or YAML would make of them."""
    record = read_provenance(checkpoint)
    record["source_files"] = {NASTY: "0" * 64}
    record |= {"source": NASTY, "preset": NASTY, "overrides": {"decay": NASTY}}
    record = add_stage(record, NASTY, **stage(1, NASTY, device=NASTY, dtype=NASTY, teacher=NASTY))
    write_provenance(checkpoint, record)
    tasks = [task("recall", NASTY, {"teacher": 0.5, "student": 0.25, "window_only": NASTY}, metric=NASTY)]
    found = evaluation(
        *tasks, tokens=58024, subjects=SUBJECTS | {"teacher": NASTY, "window_only": NASTY}, dtype=NASTY, device=NASTY
    )
    found |= {"command": "dijiang evaluate `` ` | {{ 1 }}", "time": NASTY}
    row = {"phase": NASTY, "batch": 1, "context": 1}
    speeds = latency(row | {"tokens_per_s": {NASTY: 1.0}, "cache_bytes": {NASTY: 0}}, row | {"left_out": NASTY})
    card = model_card(checkpoint, found, speeds)
    for rows in tables(card):
        assert {len(row) for row in rows} == {len(rows[0])}
    assert table(card, "file")[1] == [NASTY_SHOWN, "0" * 64]
    assert table(card, "task")[0][4] == table(card, "task")[1][0] == NASTY_SHOWN
    assert table(card, "task")[1][1] == f"{NASTY_SHOWN} ↑"
    assert table(card, "phase")[0][3:] == [f"{NASTY_SHOWN}, tokens/s", f"{NASTY_SHOWN}, cache"]
    stages, texts = tables(card)[-2:]
    assert [stages[-1][i] for i in (0, 4, 5, 6)] == [NASTY_SHOWN] * 4 and texts[-1][:2] == [NASTY_SHOWN] * 2
    words = text_of(card)
    assert f"{NASTY_SHOWN}, {NASTY_SHOWN}: left out, {NASTY_SHOWN}" in words
    assert f"with the preset {NASTY_SHOWN} and " in words and f"of one.txt, two.jsonl, {NASTY_SHOWN} and" in words
    assert f"on {NASTY_SHOWN}: DiJiang 0.250, teacher 0.500." in words
    parsed = MarkdownIt("commonmark").enable("table").parse(card.text)
    inline = [child.type for token in parsed for child in token.children or [] if child.type not in ("text", "softbreak")]
    assert {*inline} <= {"code_inline", "link_open", "link_close", "strong_open", "strong_close"}
    assert [token.tag for token in parsed if token.type == "heading_open"] == ["h1"] + ["h2"] * 6
    write_model_card(checkpoint, found, speeds)
    assert metadata_load(checkpoint / "README.md")["model-index"][0]["name"].endswith("-dijiang")


def test_no_path_of_this_machine_is_told(checkpoint, tmp_path):
    home = str(tmp_path / "qq ww" / "secret")
    command = f"dijiang evaluate {checkpoint} --against=../up/teacher --text '{home}/held out.txt' --tasks ~/me/task.yaml"
    found = evaluation(
        task("perplexity", f"{tmp_path}/up/book.txt, 64",
             {"teacher": 1.0, "student": f"no file:///{tmp_path}/up/x.py (tokens/s)"}),
        command=f"{command} --set 'data=[private/one.txt,C:\\me\\two.txt]'",
        device=f"cpu of {tmp_path}/up/host",
    )  # fmt: skip
    record = read_provenance(checkpoint)
    write_provenance(checkpoint, record | {"source": f"{tmp_path}/up/source", "overrides": {"x": f"{tmp_path}/up/y"}})
    text = str(model_card(checkpoint, found))
    for secret in (str(tmp_path), tmp_path.name, tmp_path.parent.name, "secret", "qq ww", "~", "private", "C:", "/up", "me\\"):
        assert secret not in text, secret
    expected = (
        "dijiang evaluate student --against=teacher --text 'held out.txt' --tasks task.yaml --set 'data=[one.txt,two.txt]'"
    )
    assert f"\n{expected}\n" in text and "book.txt, 64" in text and "no x.py (tokens/s)" in text


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("EleutherAI/pythia-14m", None),
        ("12.5 tokens/s and/or 3 / 4 or <b>c</b>", None),
        ("see https://arxiv.org/abs/2403.19928.", None),
        ("at /a/b/c.txt: no, error:/a/d", "at c.txt: no, error:d"),
        ("in '/a/b', ~/c/d and ./e/f", "in 'b', d and f"),
        ("D:\\a\\b.txt is gone", "b.txt is gone"),
        ("a\tb\nc\x00d\u2028e", "a b c d e"),
    ],
)
def test_plain_text(text, kept):
    assert module.plain(text) == (text if kept is None else kept)


# --- the snippet ---


def test_the_snippet_runs_as_it_stands(pair, tmp_path):
    """In a fresh process without the package, beside a folder of any name, it writes what the model writes here."""
    folder = tmp_path / 'it\'s "my" model.v2'
    shutil.copytree(pair.checkpoint, folder)
    (python,) = [t.content for t in MarkdownIt().parse(model_card(folder).text) if t.type == "fence" and t.info == "python"]
    settings = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "DIJIANG_NATIVE": "0"}
    command = [sys.executable, "-c", f"import sys; sys.modules['dijiang'] = None\n{python}"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model, tokenizer = load_source(folder)
    prompt = tokenizer("The first thing to know is", return_tensors="pt")
    assert done.stdout == tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]) + "\n"


# --- writing and refusing ---


def test_a_card_of_someone_else_stays(checkpoint, refused):
    path = checkpoint / "README.md"
    for text in ("# Mine\n", f"# Mine, with {MARKER} inside\n", ""):
        path.write_text(text, encoding="utf-8")
        refused(checkpoint, lambda: write_model_card(checkpoint), "README.md was not written by dijiang; move it away")
        assert path.read_text(encoding="utf-8") == text
    write_model_card(checkpoint, replace=True)
    assert path.read_text(encoding="utf-8") == str(model_card(checkpoint))
    write_model_card(checkpoint, evaluation(task("recall", "needle", {"student": 0.5})))  # ours is replaced
    assert "needle" in path.read_text(encoding="utf-8")
    assert [p.name for p in checkpoint.iterdir() if "README" in p.name] == ["README.md"]


def test_a_failed_write_leaves_the_old_card(checkpoint, refused, monkeypatch):
    path = write_model_card(checkpoint)
    before = path.read_bytes()

    def full(self, draft):
        draft.write_text("half", encoding="utf-8")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ModelCard, "save", full)
    refused(checkpoint, lambda: write_model_card(checkpoint), r"README.md \(No space left on device\)")
    assert path.read_bytes() == before


def test_refusals(pair, checkpoint, refused):
    refused(pair.teacher, lambda: model_card(pair.teacher), "holds no provenance.json, so it is not a DiJiang checkpoint")
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.glob("*.safetensors")}
    right = {"name": "student", "tokens": 58023, "weights": found}
    model_card(checkpoint, evaluation(student=right), latency() | {"models": {"files": found}})
    refused(checkpoint, lambda: write_model_card(checkpoint, evaluation()), "evaluation is of other weights than those in")
    message = "latency is of another model than that in .*; measure this checkpoint"
    refused(checkpoint, lambda: write_model_card(checkpoint, latency=latency()), message)
    shape = latency() | {"models": {"weights": "random"}}
    refused(checkpoint, lambda: write_model_card(checkpoint, latency=shape), message)
    refused(checkpoint, lambda: write_model_card(checkpoint, latency()), "the evaluation given is of kind 'latency'")
    refused(checkpoint, lambda: write_model_card(checkpoint, latency={"rows": []}), "the latency given is of kind None")
    shutil.copyfile(pair.teacher / "config.json", checkpoint / "config.json")
    refused(checkpoint, lambda: model_card(checkpoint), "holds a llama model; give the folder of a DiJiang checkpoint")


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub: what it was asked, and the (status, text) that it answers."""

    class Hub(BaseHTTPRequestHandler):
        asked, answer = [], (200, "")

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.asked.append((self.path, body))
            status, text = self.answer
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield Hub
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_hub_is_asked_only_if_wanted(checkpoint, refused, hub):
    write_model_card(checkpoint)
    assert hub.asked == []
    path = write_model_card(checkpoint, validate_online=True)
    assert hub.asked == [("/api/validate-yaml", {"repoType": "model", "content": path.read_text(encoding="utf-8")})]
    path.unlink()
    hub.answer = (400, 'error: "license"\nmust be one of ...')
    message = '^the hub refuses the card: error: "license" must be one of ...$'
    refused(checkpoint, lambda: write_model_card(checkpoint, validate_online=True), message)
    hub.answer = (503, "down")
    refused(checkpoint, lambda: write_model_card(checkpoint, validate_online=True), "^the hub did not check the card: .*503")


def test_a_hub_out_of_reach_is_said(checkpoint, refused, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    refused(checkpoint, lambda: write_model_card(checkpoint, validate_online=True), "^the hub did not check the card: ")

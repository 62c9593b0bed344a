"""evaluate, report, card and benchmark latency: what they pass on, what they refuse. Their help is tested with the others'."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from dijiang.bundled import HELD_OUT_TEXT
from dijiang.evaluate import EvaluationConfig

EVALUATION = {"kind": "evaluation", "tasks": [], "subjects": {}}


def test_evaluate_passes_its_words_on(command, monkeypatch, tmp_path):
    calls = []

    def called(checkpoint, teacher, output, config, beside, cache):
        calls.append((checkpoint, teacher, output, config, beside, cache))
        return EVALUATION

    monkeypatch.setattr("dijiang.evaluate.evaluate_model", called)
    words = ["evaluate", "student", "--against", "teacher"]
    assert command(*words)[0] == 0
    assert calls.pop() == ("student", "teacher", Path("evaluation"), EvaluationConfig(texts=(HELD_OUT_TEXT,)), (), None)
    words += ["--output", "out", "--text", "a.txt", "--text", "b.txt", "--text-tokens", 99, "--length", 7, "--length", 9]
    words += ["--stride", 3, "--recall-length", 0, "--tasks", "piqa", "--tasks", "t.yaml", "--limit", 5, "--num-fewshot", 2]
    words += ["--batch-size", 4, "--dtype", "float32", "--device", "cpu", "--cache", tmp_path]
    words += ["--beside", "other", "--beside", "org/third"]
    assert command(*words)[0] == 0
    expected = EvaluationConfig(
        texts=(Path("a.txt"), Path("b.txt")), text_tokens=99, lengths=(7, 9), stride=3, recall_lengths=(),
        tasks=("piqa", "t.yaml"), limit=5, num_fewshot=2, batch_size=4, dtype="float32", device="cpu",
    )  # fmt: skip
    assert calls.pop() == ("student", "teacher", Path("out"), expected, ("other", "org/third"), tmp_path)
    assert command(*words, "--quick")[0] == 0
    assert calls.pop()[3] == expected.quick()
    assert command("evaluate", "student", "--against", "teacher", "--text-tokens", 0)[0] == 0
    assert calls.pop()[3].text_tokens is None


def test_evaluate_needs_a_teacher(command):
    code, _, err = command("evaluate", "student")
    assert code == 2 and "missing option '--against'" in err.lower()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"x\.json cannot be read as JSON \(.*\); give what `dijiang evaluate` wrote"),
        ("[]", r"x\.json is no result of `dijiang evaluate` or `dijiang benchmark latency`"),
        ('{"kind": "other"}', r"x\.json is no result of"),
    ],
)
def test_report_refuses_other_files(fails, tmp_path, content, message):
    (tmp_path / "x.json").write_text(content, encoding="utf-8")
    fails(message, "report", tmp_path / "x.json", "--output", tmp_path / "out")


def test_report_refuses_what_is_not_there_and_two_of_a_kind(fails, tmp_path):
    (tmp_path / "empty").mkdir()
    fails(
        "empty holds neither evaluation.json nor latency.json; give the folder that", "report", tmp_path / "empty",
        "--output", tmp_path / "out",
    )  # fmt: skip
    for name in ("one.json", "two.json"):
        (tmp_path / name).write_text(json.dumps(EVALUATION), encoding="utf-8")
    fails(
        "two.json is the second result of kind evaluation; a report shows one of each", "report", tmp_path / "one.json",
        tmp_path / "two.json", "--output", tmp_path / "out",
    )  # fmt: skip


def test_card(command, fails, pair, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in pair.checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert command("card", folder) == (0, f"wrote {folder / 'README.md'}\n", "")
    assert "has not been evaluated" in ModelCard.load(folder / "README.md").text.lower()
    (folder / "README.md").write_text("# theirs", encoding="utf-8")
    fails("README.md was not written by dijiang; move it away, or ask for it to be replaced", "card", folder)
    assert command("card", folder, "--replace")[0] == 0
    fails("the hub did not check the card", "card", folder, "--validate")
    fails("nowhere holds no provenance.json", "card", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give either a CHECKPOINT and --against TEACHER, or --shape NAME"),
        (("student",), "give either a CHECKPOINT and --against TEACHER"),
        (("student", "--against", "t", "--shape", "pythia-70m"), "give either a CHECKPOINT and --against TEACHER"),
        (("--against", "t", "--shape", "pythia-70m"), "give either a CHECKPOINT and --against TEACHER"),
        (("student", "--against", "t", "--set", "decay=retnet"), "--preset and --set are for a --shape"),
        (
            ("--shape", "pythia-7m"),
            r"shape 'pythia-7m' is unknown \(did you mean pythia-70m\?\); choose from smollm2-135m, pythia-70m",
        ),
        (
            ("--shape", "pythia-70m", "--phases", "decode,sleep"),
            "phases decode, sleep are unknown; choose from",
        ),
        (("--shape", "pythia-70m", "--set", "windows=3"), "unknown setting 'windows'"),
        (("--shape", "pythia-70m", "--dtype", "float12"), "dtype 'float12' is unknown"),
    ],
)
def test_latency_of_what_cannot_be_measured(fails, words, message):
    fails(message, "benchmark", "latency", *words)


def test_latency_outputs_must_be_free(fails, tmp_path):
    (tmp_path / "taken.json").touch()
    words = ("benchmark", "latency", "--shape", "pythia-70m")
    fails("taken.json exists already; choose a new file or remove it", *words, "--output", tmp_path / "taken.json")
    fails("output folder .* is not empty", *words, "--plot", tmp_path)


def test_report_refuses_results_of_two_checkpoints(fails, tmp_path):
    evaluation = EVALUATION | {"student": {"weights": {"model.safetensors": "a"}}}
    latency = {"kind": "latency", "models": {"files": {"model.safetensors": "b"}}}
    for result in (evaluation, latency):
        (tmp_path / f"{result['kind']}.json").write_text(json.dumps(result), encoding="utf-8")
    fails("the evaluation and the latency are of different checkpoints", "report", tmp_path, "--output", tmp_path / "out")

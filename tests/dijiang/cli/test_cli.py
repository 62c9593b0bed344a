"""The command line: exit codes, one line per error, and help that is quick and says the truth."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import yaml

from dijiang.checkpoint.provenance import read_provenance
from dijiang.convert import convert_model
from dijiang.train import AlignConfig, load_recipe
from dijiang.train.__main__ import parse_arguments
from dijiang.train.estimate.estimate import estimate, render
from dijiang.train.recipe.load import bundled_recipes

COMMANDS = (
    *("convert", "align", "distill", "recover", "estimate", "demo", "evaluate", "report", "card", "benchmark kernels"),
    *("benchmark latency", "benchmark recall", "prune", "unpack", "refresh-code", "select", "fit"),
)


def in_a_process(*arguments, **environment) -> subprocess.CompletedProcess:
    """`python -m dijiang ...` in a fresh process, offline."""
    command = [sys.executable, "-m", "dijiang", *map(str, arguments)]
    settings = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(command, env=settings, capture_output=True, text=True, check=False)


# --- convert ---


def test_convert(command, pair, tmp_path):
    words = ("--set", "attention_window=16", "--set", "feature_map=hedgehog", "--dtype", "bfloat16")
    code, out, err = command("convert", pair.teacher, tmp_path / "new", *words)
    assert (code, out) == (0, f"wrote {tmp_path / 'new'}\n") and "Traceback" not in err
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (config["attention_window"], config["feature_map"], config["dtype"]) == (16, "hedgehog", "bfloat16")
    assert config["attention_sinks"] == 4  # of the preset
    assert read_provenance(tmp_path / "new")["preset"] == "recommended"
    assert command("convert", pair.teacher, tmp_path / "paper", "--preset", "paper")[0] == 0
    assert json.loads((tmp_path / "paper" / "config.json").read_text())["decay"] == "retnet"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--preset", "best"), "preset 'best' is unknown; choose from recommended, linear, paper"),
        (("--set", "featuremap=wdcf"), r"unknown setting 'featuremap' \(did you mean feature_map\?\); these can be set: "),
        (("--set", "hidden_size=64"), "hidden_size is given by the source model and cannot be changed on conversion"),
        (("--set", "attention_window"), "'attention_window' is not KEY=VALUE; write for example attention_window=64"),
        (("--set", "layer_types=[a"), r"--set 'layer_types=\[a': it is not valid YAML"),
        (("--set", "decay=none", "--set", "decay=retnet"), "decay is set twice"),
        (("--set", "feature_map=wdfc"), "feature_map='wdfc' is unknown; choose one of wdcf"),
        (("--set", "attention_window=wide"), "attention_window"),
        (("--dtype", "int8"), "dtype 'int8' is unknown; choose from auto, float32"),
    ],
)
def test_convert_with_words_that_make_no_sense(fails, pair, tmp_path, words, message):
    fails(message, "convert", pair.teacher, tmp_path / "new" / "out", *words)


def test_convert_sources_and_outputs_that_will_not_do(fails, pair, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "theirs").write_text("1")
    fails("output folder .*taken is not empty; choose a new one", "convert", pair.teacher, tmp_path / "taken")
    fails("none is neither a folder, nor a GGUF file, nor a hub id", "convert", tmp_path / "none", tmp_path / "out")
    fails("nobody/nothing is neither a folder nor a GGUF file.*offline", "convert", "nobody/nothing", tmp_path / "out")
    fails("theirs is a file, but not a GGUF file", "convert", tmp_path / "taken" / "theirs", tmp_path / "out")
    fails("is a DiJiang checkpoint already", "convert", pair.checkpoint, tmp_path / "out")


# --- align, distill, recover ---

STAGE = {"tokens": 200, "block_size": 32, "batch_size": 2}


@pytest.fixture
def recipe(pair, text_file, tmp_path):
    """recipe(**sections) -> the file of a short recipe with output tmp_path / "out", and these sections instead."""

    def write(**sections):
        content = {
            "source": str(pair.teacher),
            "output": str(tmp_path / "out"),
            "convert": {"settings": {"attention_window": 4, "attention_sinks": 2}},
            "data": {"train": [str(text_file)], "cache": str(tmp_path / "tokens")},
            "align": STAGE | {"calibrate_blocks": 1},
            "distill": STAGE,
            "run": {"device": "cpu", "dtype": "float32", "log_every": 1, "report_to": []},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content | sections), encoding="utf-8")
        return tmp_path / "recipe.yaml"

    return write


def stages(model) -> list[str]:
    return [record["stage"] for record in read_provenance(model)["stages"]]


def test_the_stages_one_by_one(command, recipe, tmp_path):
    words = ("--set", "align.seed=7", "--set", "align.kernel_learning_rate=0.01")
    code, out, err = command("align", recipe(), *words)
    model = tmp_path / "out" / "align" / "model"
    assert (code, out) == (0, "") and err.endswith(f"dijiang: wrote {model}\n")
    assert re.search(r"^Aligning: step 3/3, 192 tokens, [\d,]+ tokens/s, loss \d\.\d{4}, .* left$", err, re.MULTILINE)
    record = read_provenance(model)["stages"][-1]
    expected = AlignConfig(**STAGE, calibrate_blocks=1, seed=7, kernel_learning_rate=0.01)
    assert record["config"] == json.loads(json.dumps(dataclasses.asdict(expected))) and record["tokens"] == 192
    assert not (tmp_path / "out" / "distill").exists()

    code, out, err = command("distill", recipe(), *words)
    model = tmp_path / "out" / "distill" / "model"
    assert (code, out) == (0, "") and err.endswith(f"dijiang: wrote {model}\n")
    assert "Distilling: step 3/3, 192 tokens" in err and "Aligning" not in err
    assert stages(model) == ["convert", "align", "distill"]
    config = json.loads((model / "config.json").read_text())
    assert (config["attention_window"], config["attention_sinks"]) == (4, 2)


def test_recover_does_it_all_and_leaves_out_what_is_done(command, recipe, tmp_path):
    model = tmp_path / "out" / "distill" / "model"
    code, out, err = command("recover", recipe())
    assert (code, out) == (0, "") and err.endswith(f"dijiang: wrote {model}\n")
    assert err.index("Aligning: step 3/3") < err.index("Distilling: step 3/3")
    assert stages(model) == ["convert", "align", "distill"]
    before = (model / "model.safetensors").stat().st_mtime_ns
    code, _, err = command("recover", recipe())
    assert code == 0 and "step" not in err and (model / "model.safetensors").stat().st_mtime_ns == before


def test_recover_of_a_recipe_with_one_stage(command, recipe, tmp_path):
    assert command("recover", recipe(), "--set", "align=null")[0] == 0
    assert stages(tmp_path / "out" / "distill" / "model") == ["convert", "distill"]


@pytest.mark.parametrize("name", ["align", "distill", "recover"])
def test_words_reach_the_run_that_launchers_start(command, monkeypatch, name):
    calls = []
    monkeypatch.setattr("dijiang.train.launch.run_recipe", lambda *arguments: calls.append(arguments) or 0)
    words = ("--set", "data.train=[a.txt, b=c.txt]", "--set", "-x", "--", "--a recipe")
    assert command(name, *words) == (0, "", "")
    stage = None if name == "recover" else name
    assert calls == [("--a recipe", ["data.train=[a.txt, b=c.txt]", "-x"], stage)]


def test_words_of_a_launcher_reach_the_same_run():
    words = ["--local_rank=1", "--stage", "align", "--set", "data.train=[a.txt, b=c.txt]", "--set=-x", "--", "--a recipe"]
    given = vars(parse_arguments(words))
    assert given == {"recipe": "--a recipe", "stage": "align", "set": ["data.train=[a.txt, b=c.txt]", "-x"], "local_rank": 1}


@pytest.mark.parametrize("code", [1, 3, 130])
def test_what_the_run_printed_is_not_printed_again(command, monkeypatch, code):
    monkeypatch.setattr("dijiang.train.launch.run_recipe", lambda recipe, sets, stage: code)
    assert command("recover", "x") == (code, "", "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"data\.txt: empty file; give a file with text"),
        (b" \n", r"data\.txt: empty file; give a file with text"),
        (b"abc\xff", r"data\.txt line 1: not UTF-8 \(byte 3 of the file\); convert the file to UTF-8"),
        (b"the cat sat", r"data\.txt: \d+ tokens do not fill one block of 32; give more text or a smaller block_size"),
        (None, r"data\.txt: no such file or folder; correct the path"),
    ],
)
def test_align_on_data_that_will_not_do(command, recipe, tmp_path, content, message):
    data = tmp_path / "data.txt"
    if content is not None:
        data.write_bytes(content)
    code, out, err = command("align", recipe(data={"train": [str(data)], "cache": str(tmp_path / "tokens")}))
    last = err.splitlines()[-1]
    assert (code, out) == (1, "") and re.match(f"dijiang: .*{message}", last) and "Traceback" not in err, err
    assert not (tmp_path / "out" / "align" / "model").exists() and not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "align.tokens=10"), r"recipe .*: align: tokens=10 is less than one step .* 64 in all"),
        (("--set", "align.kernel_learning_rate=0"), r"align: kernel_learning_rate=0\.0 must be greater than 0"),
        (("--set", "align.learning_rate=1"), r"unknown key align\.learning_rate; learning_rate belongs to distill"),
        (("--set", "align"), "--set 'align' is not KEY=VALUE; write for example align.tokens=20000"),
        (("--set", "align.seed=1", "--set", "align.seed=2"), "--set gives align.seed twice; keep one of them"),
        (("--set", "run.dtype=int8"), "run.dtype is 'int8'; choose auto, bfloat16 or float32"),
        (("--set", "run.device=abacus"), "device='abacus' is unknown; choose auto, cpu or cuda"),
        (("--set", "align=null"), "the recipe has no section align; it has distill"),
    ],
)
def test_align_with_words_that_make_no_sense(fails, recipe, words, message):
    fails(message, "align", recipe(), *words)


@pytest.mark.parametrize("name", ["align", "distill", "recover", "estimate"])
def test_recipes_that_are_not_there(fails, name):
    fails("recipe smollm is neither a file nor a bundled recipe such as smollm2-135m", name, "smollm")


def test_sources_and_outputs_that_will_not_do(command, recipe, pair, make_source, tmp_path):
    def last(*words) -> str:
        code, out, err = command(*words)
        assert (code, out) == (1, "") and "Traceback" not in err
        return err.splitlines()[-1]

    assert "out/align/model is not there yet; run the align stage first" in last("distill", recipe())
    (tmp_path / "file").write_text("1")
    assert "file (Not a directory); choose another output" in last("align", recipe(output=str(tmp_path / "file")))
    source = {"source": str(pair.checkpoint), "output": str(tmp_path / "other")}
    assert "is a DiJiang checkpoint already" in last("align", recipe(**source))
    other, _ = make_source(seed=1, num_key_value_heads=2)
    convert_model(other, tmp_path / "new" / "converted", attention_window=4, attention_sinks=2, progress=False)
    theirs = last("align", recipe(output=str(tmp_path / "new")))
    assert "teacher is not the model that this checkpoint was converted from" in theirs
    assert not list(tmp_path.rglob("model"))


def test_what_training_needs_may_be_missing(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    fails(r"training needs packages that are missing; run: pip install 'dijiang\[train\]'", "recover", "smollm2-135m")


# --- estimate ---


def test_estimate(command, recipe):
    path = recipe()
    found = estimate(load_recipe(path, ["distill.tokens=6400"]), gpu="v100", gpus=2)
    words = ("--set", "distill.tokens=6400", "--gpu", "v100", "--gpus", 2)
    assert command("estimate", path, *words) == (0, render(found) + "\n", "")
    assert command("estimate", path)[1] == render(estimate(load_recipe(path), gpu="h100", gpus=1)) + "\n"


def test_estimate_of_what_there_is_not(fails, recipe):
    fails("gpu 'abacus' is unknown; choose from h200, h100, ", "estimate", recipe(), "--gpu", "abacus")
    fails("gpus=0 must be at least 1", "estimate", recipe(), "--gpus", 0)


# --- demo ---


def test_demo_passes_its_words_on(command, fails, monkeypatch, tmp_path):
    calls = []
    for name in ("dijiang.demo.run_demo", "dijiang.quick_demo.run_quick_demo"):
        monkeypatch.setattr(name, lambda output, *, name=name, **settings: calls.append((name, output, settings)))
    words = ("--output", tmp_path / "x", "--source", "s")
    assert command("demo", "--full", *words, "--contexts", 64, "--contexts", 128)[0] == 0
    assert command("demo", "--full")[0] == 0 and command("demo", *words)[0] == 0 and command("demo")[0] == 0
    full, defaults, quick, quick_defaults = calls
    assert full == ("dijiang.demo.run_demo", tmp_path / "x", {"source": "s", "recipe": None, "contexts": [64, 128]})
    assert defaults[2] == {"source": None, "recipe": None, "contexts": None}
    assert quick == ("dijiang.quick_demo.run_quick_demo", tmp_path / "x", {"source": "s"})
    assert quick_defaults[2] == {"source": None}
    fails("--recipe and --contexts have no effect without --full", "demo", "--contexts", 64)


def test_demo_on_an_output_that_is_taken(fails, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "theirs").write_text("1")
    fails("output folder .*taken is not empty", "demo", "--output", tmp_path / "taken")


# --- words that typer refuses, and processes ---


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("transform",), "no such command 'transform'"),
        (("convert",), "missing argument 'source'"),
        (("convert", "a", "b", "--windows", "3"), "no such option: --windows"),
        (("recover",), "missing argument 'recipe'"),
        (("align", "a", "--tokens", "5"), "no such option: --tokens"),
        (("estimate", "a", "--gpus", "many"), "invalid value for '--gpus'"),
        (("demo", "--contexts", "0"), "invalid value for '--contexts'"),
    ],
)
def test_words_that_do_not_parse(command, words, said):
    code, out, err = command(*words)
    assert code == 2 and out == "" and said in err.lower() and "Traceback" not in err  # typer changes its case


def test_other_errors_keep_their_traceback(command, monkeypatch, pair, tmp_path):
    """What a user cannot mend is a bug, and its place must show."""
    monkeypatch.setattr("dijiang.convert.convert_model", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("convert", pair.teacher, tmp_path / "out")


def test_a_full_disk_is_one_line_too(command, pair, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dijiang.checkpoint.shard_writer.save_file", full)
    code, _, err = command("convert", pair.teacher, tmp_path / "out")
    assert (code, err) == (1, "dijiang: [Errno 28] No space left on device\n")
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_a_process_is_one_line(pair, tmp_path):
    done = in_a_process("convert", pair.checkpoint, tmp_path / "out")
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"dijiang: .*is a DiJiang checkpoint already.*\n", done.stderr)


@pytest.mark.parametrize("words", [("convert", "a", "b"), ("demo", "--output", "b")])
def test_interrupted_while_it_works(command, monkeypatch, words):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("dijiang.convert.convert_model", interrupted)
    monkeypatch.setattr("dijiang.quick_demo.run_quick_demo", interrupted)
    code, out, err = command(*words)
    assert (code, out) == (130, "") and err == "dijiang: interrupted; nothing half-written was left\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stage_interrupted_goes_on_with_the_same_command(command, recipe, tmp_path, number):
    """Ctrl-C or a polite kill: one line at the end, the shell's code for it, and a checkpoint."""
    path = recipe(align=STAGE | {"tokens": 6400, "calibrate_blocks": 1})
    process = subprocess.Popen(
        [sys.executable, "-m", "dijiang", "align", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if "step 2/100" in line:
                break
        process.send_signal(number)
        out, rest = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and out == "", said
    ending = r"dijiang: align was stopped after step (\d+) of 100, with a checkpoint; run the same command again to continue"
    stopped = re.fullmatch(ending, rest.splitlines()[-1])
    assert stopped and 2 <= int(stopped[1]) < 100, rest
    assert not (tmp_path / "out" / "align" / "model").exists()

    code, _, err = command("align", path)
    assert code == 0 and f"continuing at step {stopped[1]} of 100" in err
    record = read_provenance(tmp_path / "out" / "align" / "model")["stages"][-1]
    assert record["stage"] == "align" and record["tokens"] == 6400


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_needs_no_torch(name, tmp_path):
    code = f"""
import sys
sys.argv = ["dijiang", *{name.split()}, "--help"]
from dijiang.cli import main
try:
    main()
finally:
    print([module for module in ("torch", "transformers", "dijiang.modeling") if module in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Usage: dijiang {name}".strip() in done.stdout and done.stdout.endswith("[]\n")
    assert name or all(command.split()[0] in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("name", ["", "benchmark", *COMMANDS])
def test_help_fits_one_screen(command, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = command(*name.split(), "--help")
    lines = out.splitlines()
    assert code == 0 and len(lines) <= 24 and max(map(len, lines)) <= 100


@pytest.mark.parametrize("name", ["evaluate", "prune"])
def test_all_settings_are_listed(command, name):
    code, out, _ = command(name, "--list-settings")
    assert code == 0 and "--list-settings" in command(name, "--help")[1]
    assert re.search(r"^seed=0$", out, re.MULTILINE) and re.search(r"^device=auto$", out, re.MULTILINE)


def words_of(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", ["align", "distill", "recover"])
def test_help_teaches(command, name):
    text = words_of(command(name, "--help")[1])
    (example,) = re.findall(rf"Example: dijiang {name} (\S+)((?: --set \S+=\S+)+)", text)
    recipe = load_recipe(example[0], example[1].split()[1::2])  # the example's words make sense
    assert name == "recover" or name in recipe.stages
    stage = "" if name == "recover" else f" --stage {name}"
    for launcher in ("deepspeed --module", "torchrun --nproc-per-node 8 -m"):
        assert f"{launcher} dijiang.train RECIPE{stage}" in text
    listed = re.search(r"or a bundled recipe: (.*?)\.? \[required\]", text)[1].rstrip(".").split(", ")
    assert listed == sorted(bundled_recipes().keys() - {"demo"})


def test_help_of_estimate(command):
    text = words_of(command("estimate", "--help")[1])
    example = re.search(r"Example: dijiang (estimate \S+ --gpu \S+ --gpus \d+)", text)[1].split()
    assert command(*example)[0] == 0
    assert "[default: h100]" in text and "[default: 1]" in text

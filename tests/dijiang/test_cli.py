"""The command line: exit codes, one line per error, and help that is quick and says the truth."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from dijiang import cli
from dijiang.convert import read_provenance
from dijiang.train import AlignConfig

COMMANDS = ("convert", "align", "demo", "benchmark kernels")


@pytest.fixture
def command(monkeypatch, capsys):
    """command("align", ...) -> (exit code, stdout, stderr) of `dijiang align ...` in this process."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dijiang", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def fails(command, tmp_path):
    """fails(message, *arguments): exit code 1, one line on stderr that matches, nothing else said, nothing written."""

    def check(message: str, *arguments) -> None:
        before = sorted(tmp_path.rglob("*"))
        code, out, err = command(*arguments)
        assert code == 1 and out == ""
        assert re.fullmatch(rf"dijiang: .*{message}.*\n", err), err
        assert sorted(tmp_path.rglob("*")) == before

    return check


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
        (("--preset", "best"), "preset 'best' is unknown; choose from recommended, paper"),
        (("--set", "featuremap=wdcf"), r"unknown setting 'featuremap' \(did you mean feature_map\?\); these can be set: "),
        (("--set", "hidden_size=64"), "hidden_size is given by the source model and cannot be changed on conversion"),
        (("--set", "attention_window"), "'attention_window' is not KEY=VALUE; write for example attention_window=64"),
        (("--set", "layer_types=[a"), r"the value of 'layer_types=\[a' is not valid YAML"),
        (("--set", "decay=none", "--set", "decay=retnet"), "decay is set twice"),
        (("--set", "feature_map=wdfc"), "feature_map='wdfc' is unknown; choose one of wdcf"),
        (("--set", "attention_window=wide"), "attention_window"),
        (("--dtype", "int8"), "dtype 'int8' is unknown; choose auto, float32"),
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


# --- align ---


@pytest.fixture
def align_words(pair, text_file, tmp_path):
    """align_words(*more) -> the words of a short `dijiang align` into tmp_path / "out"."""
    words = ["align", pair.checkpoint, "--teacher", pair.teacher, "--data", text_file, "--output", tmp_path / "out"]
    return lambda *more: [*words, *more]


def test_align(command, align_words, tmp_path, text_file):
    words = (
        "--tokens",
        200,
        "--block-size",
        32,
        "--batch-size",
        2,
        "--learning-rate",
        0.01,
        "--seed",
        7,
        "--dtype",
        "float32",
    )
    code, out, err = command(*align_words(*words, "--data", text_file, "--device", "cpu"))
    assert (code, out) == (0, f"wrote {tmp_path / 'out'}\n")
    assert re.fullmatch(r"Aligning: 192/192 tokens, [\d,]+ tokens/s, loss \d\.\d{4}, 0 s left\n", err)
    stage = read_provenance(tmp_path / "out")["stages"][-1]
    given = {"tokens": 200, "block_size": 32, "batch_size": 2, "learning_rate": 0.01, "seed": 7, "dtype": "float32"}
    assert AlignConfig(**stage["config"]) == AlignConfig(**given, device="cpu") and stage["tokens"] == 192
    assert stage["data"] == [text_file.name] * 2


def test_align_options_win_over_the_recipe_and_the_recipe_over_defaults(command, align_words, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("tokens: 640\nblock_size: 64\nquiet: 1\nseed: 3\ndtype: float32\ndevice: cpu\n")
    assert command(*align_words("--recipe", recipe, "--tokens", 128, "--seed", 0))[0] == 0
    expected = AlignConfig(tokens=128, block_size=64, quiet=1.0, seed=0, dtype="float32", device="cpu")
    assert AlignConfig(**read_provenance(tmp_path / "out")["stages"][-1]["config"]) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"data\.txt is empty; give a file with text"),
        (b" \n", r"data\.txt is empty; give a file with text"),
        (b"abc\xff", r"data\.txt is not UTF-8 text \(byte 3\); convert it to UTF-8"),
        (b"the cat sat", r"data\.txt: \d+ tokens do not fill one block of 32; give more text or a smaller block"),
        (None, r"cannot read .*data\.txt: No such file or directory"),
    ],
)
def test_align_on_data_that_will_not_do(fails, pair, tmp_path, content, message):
    data = tmp_path / "data.txt"
    if content is not None:
        data.write_bytes(content)
    words = ("--teacher", pair.teacher, "--data", data, "--output", tmp_path / "out", "--block-size", 32, "--dtype", "float32")
    fails(message, "align", pair.checkpoint, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tokens", 10), r"tokens=10 is less than one step of 1024 \(batch_size \* block_size\)"),
        (("--learning-rate", 0), r"learning_rate=0\.0 must be greater than 0"),
        (("--dtype", "int8"), "dtype='int8' is unknown; choose auto, float32 or bfloat16"),
        (("--device", "abacus"), "device='abacus' is unknown; choose auto, cpu or cuda"),
        (("--recipe", "none.yaml"), r"cannot read recipe none\.yaml: No such file or directory"),
        (("--learning-rate", 1e38, "--block-size", 32, "--dtype", "float32"), "lower learning_rate"),
    ],
)
def test_align_with_words_that_make_no_sense(fails, align_words, words, message):
    fails(message, *align_words(*words))


def test_align_checkpoints_and_teachers_that_will_not_do(fails, align_words, pair, make_source, text_file, tmp_path):
    other, _ = make_source(seed=1, num_key_value_heads=2)
    words = ("--data", text_file, "--output", tmp_path / "out", "--block-size", 32, "--dtype", "float32")
    fails("teacher holds no provenance.json, so it is not a DiJiang", "align", pair.teacher, "--teacher", pair.teacher, *words)
    fails("is not the model that this checkpoint was converted from", "align", pair.checkpoint, "--teacher", other, *words)
    fails(
        "has linear-attention layers; give the softmax model", "align", pair.checkpoint, "--teacher", pair.checkpoint, *words
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").write_text("1")
    fails("output folder .*out is not empty", *align_words())


# --- demo ---


def test_demo_passes_its_words_on(command, monkeypatch, tmp_path):
    import dijiang.demo

    calls = []
    monkeypatch.setattr(dijiang.demo, "run_demo", lambda output, **settings: calls.append((output, settings)))
    assert command("demo", "--output", tmp_path / "x", "--source", "s", "--contexts", 64, "--contexts", 128)[0] == 0
    assert command("demo")[0] == 0
    (output, settings), (_, defaults) = calls
    assert output == tmp_path / "x" and settings == {"source": "s", "recipe": None, "contexts": [64, 128]}
    assert list(defaults["contexts"]) == [1024, 4096, 16384] and defaults["source"] is None


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
        (("align", "a", "--data", "b", "--output", "c"), "missing option '--teacher'"),
        (("align", "a", "--tokens", "many"), "invalid value for '--tokens'"),
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

    monkeypatch.setattr("dijiang.convert.writer.save_file", full)
    code, _, err = command("convert", pair.teacher, tmp_path / "out")
    assert (code, err) == (1, "dijiang: [Errno 28] No space left on device\n")
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_a_process_is_one_line(pair, tmp_path):
    done = in_a_process("align", pair.teacher, "--teacher", pair.teacher, "--data", "x", "--output", tmp_path / "out")
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"dijiang: .*teacher holds no provenance\.json, .*\n", done.stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_it_works(pair, text_file, tmp_path, number):
    """Ctrl-C or a polite kill: one line, the shell's code for it, and nothing left on disk."""
    words = ["align", pair.checkpoint, "--teacher", pair.teacher, "--data", text_file, "--output", tmp_path / "a" / "out"]
    settings = ["--tokens", 100_000_000, "--block-size", 32, "--dtype", "float32"]
    command = [sys.executable, "-m", "dijiang", *map(str, words + settings)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "a").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)  # by then it trains
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and out == ""
    assert err == "dijiang: interrupted; nothing half-written was left\n"
    assert list(tmp_path.iterdir()) == []


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


def test_help_tells_the_true_defaults(command):
    _, out, _ = command("align", "--help")
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", out).split())
    options = dict(re.findall(r"--([a-z-]+)((?:(?! --).)*)", text))
    defaults = {key.replace("-", "_"): re.search(r"\[default: ([^]]+)\]", said) for key, said in options.items()}
    stated = {key: float(found[1].replace(",", "")) for key, found in defaults.items() if found}
    assert stated == {key: getattr(AlignConfig(), key) for key in stated} and {"tokens", "learning_rate"} <= stated.keys()


def test_align_has_an_option_for_every_setting_that_it_sets():
    """Each option of that name reaches the config: none is left over."""
    options = {parameter for parameter in cli.align.__annotations__ if parameter != "return"}
    fields = {field.name for field in dataclasses.fields(AlignConfig)}
    assert options - fields == {"checkpoint", "teacher", "data", "output", "recipe"}

"""`dijiang prune` and `dijiang unpack`: settings, exit codes, messages and files."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dijiang.bundled import HELD_OUT_TEXT, TRAIN_TEXT
from dijiang.compress import PruneConfig
from dijiang.compress.oneshot import run as pruning
from dijiang.compress.oneshot.prune_layer import prune_layer


@pytest.fixture
def words(pair, text_file, tmp_path):
    """Arguments of a short `dijiang prune` of `pair.teacher` into tmp_path / "out"."""
    sizes = ("--samples", 4, "--length", 32, "--sensitivity-samples", 2, "--device", "cpu", "--cache", tmp_path / "cache")
    return ("prune", pair.teacher, tmp_path / "out", "--calibration", text_file, "--held-out", text_file, *sizes)


def test_prune_and_unpack(command, fails, words, tmp_path):
    code, out, err = command(*words, "--sparsity", "0.6", "--granularity", "layer", "--bitmask")
    assert code == 0, err
    pattern = r"sparsity 0\.600\d, held-out perplexity (\d+\.\d\d) before and (\d+\.\d\d) after\nwrote (.*)\n"
    before, after, folder = re.fullmatch(pattern, out).groups()
    metrics = json.loads((tmp_path / "out" / "pruning_metrics.json").read_text())
    assert Path(folder) == tmp_path / "out" and "Traceback" not in err
    assert (before, after) == tuple(f"{metrics['perplexity'][name]:.2f}" for name in ("dense", "pruned"))
    assert len({x["target"] for x in json.loads((tmp_path / "out" / "pruning_plan.json").read_text())["matrices"]}) == 2

    code, out, _ = command("unpack", tmp_path / "out" / "sparse-bitmask", tmp_path / "back")
    assert (code, out) == (0, f"wrote {tmp_path / 'back'}\n")
    dense, sparse = (load_file(tmp_path / name / "model.safetensors") for name in ("back", "out"))
    assert dense.keys() == sparse.keys() and all((dense[name] == sparse[name]).all() for name in sparse)
    fails("output folder .*back is not empty", "unpack", tmp_path / "out" / "sparse-bitmask", tmp_path / "back")
    fails("out is not compressed", "unpack", tmp_path / "out", tmp_path / "new")
    fails("none has no config.json", "unpack", tmp_path / "none", tmp_path / "new")
    fails("output folder .*out is not empty; choose a new one", *words)


def test_a_dry_run(command, words, pair, tmp_path):
    code, out, err = command(*words, "--dry-run")
    assert code == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["cache"], err
    rows = re.findall(r"(model\.layers\.\S+)[ │]+(\d+)[ │]+(\d+)[ │]+([\d.]+)[ │]+(0\.\d{4})", out)
    assert len(rows) == 14 and out.endswith("weights: 0.5000\n")
    weights = {name: int(rows) * int(columns) for name, rows, columns, *_ in rows}
    assert f"sparsity of all {sum(weights.values()):,} weights" in out
    stored = load_file(pair.teacher / "model.safetensors")
    assert all(stored[f"{name}.weight"].numel() == count for name, count in weights.items())
    # the same plan is then carried out
    assert command(*words)[0] == 0
    plan = json.loads((tmp_path / "out" / "pruning_plan.json").read_text())
    assert [(x["name"], f"{x['target']:.4f}") for x in plan["matrices"]] == [(row[0], row[4]) for row in rows]


@pytest.fixture
def pruned_with(command, tmp_path, monkeypatch):
    """pruned_with(*words) -> (model, output, config, cache) that `dijiang prune some/model out WORDS` prunes with."""
    calls = []

    def prune(model, output, config, *, cache):
        calls.append((model, output, config, cache))
        metrics = {"sparsity": 0.25, "perplexity": config.held_out and {"dense": 7.0, "pruned": 9.5}}
        (tmp_path / "pruning_metrics.json").write_text(json.dumps(metrics))
        return tmp_path

    monkeypatch.setattr("dijiang.compress.prune", prune)

    def call(*words):
        code, out, err = command("prune", "some/model", "out", *words)
        assert code == 0, err
        config = calls[-1][2]
        perplexity = ", held-out perplexity 7.00 before and 9.50 after" if config.held_out else ""
        assert out == f"sparsity 0.2500{perplexity}\nwrote {tmp_path}\n"
        return calls.pop()

    return call


DEFAULTS = {"calibration": (TRAIN_TEXT,), "held_out": HELD_OUT_TEXT}
OTHER_VALUES = {
    "sparsity": 0.3, "score": "obs", "granularity": "layer", "allocation": "rank", "alpha": 0.2, "budget": "shift",
    "row_weights": "fisher", "comparison": "matrix", "sensitivity": "hutchinson", "sensitivity_samples": 3,
    "normalization": "mean", "bits": 4, "samples": 5, "length": 6, "seed": 7, "device": "cpu", "held_out": Path("h.txt"),
    "method": "mixed-sparsity", "owl_m": 4.0, "block_size": 64, "damping": 0.02, "held_out_tokens": 99,
}  # fmt: skip
SWITCHES = ("true_sequential", "bitmask", "probes_by_layer")


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def test_every_setting_arrives(pruned_with, tmp_path):
    names = {field.name for field in dataclasses.fields(PruneConfig) if field.init}
    assert names == {*OTHER_VALUES, *SWITCHES, "calibration", "pattern"}
    config = PruneConfig(**OTHER_VALUES, **dict.fromkeys(SWITCHES, True), calibration=(Path("a"), Path("b")))
    flags = [word for name, value in OTHER_VALUES.items() for word in (flag(name), value)]
    flags += [*map(flag, SWITCHES), "--calibration", "a", "--calibration", "b", "--cache", "c"]
    assert pruned_with(*flags) == ("some/model", Path("out"), config, Path("c"))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in OTHER_VALUES.items()}
    settings |= dict.fromkeys(SWITCHES, True) | {"calibration": ["a", "b"]}
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    assert pruned_with(*words)[2:] == (config, None)
    (tmp_path / "prune.yaml").write_text(json.dumps(settings))  # JSON is YAML
    assert pruned_with("--config", tmp_path / "prune.yaml")[2] == config
    words = ("--config", tmp_path / "prune.yaml", "--set", "seed=1", "--sparsity", "0.4")
    assert pruned_with(*words)[2] == dataclasses.replace(config, seed=1, sparsity=0.4)


def test_defaults(pruned_with):
    assert pruned_with()[2:] == (PruneConfig(**DEFAULTS), None)
    assert pruned_with("--pattern", "2:4")[2] == PruneConfig(**DEFAULTS, pattern="2:4")
    assert pruned_with("--set", "held_out=null")[2] == PruneConfig(calibration=(TRAIN_TEXT,))


@pytest.mark.parametrize("words", [("--normalisation", "mean"), ("--set", "normalisation=mean")])
def test_a_former_name_of_a_setting(pruned_with, words, monkeypatch):
    lines = []
    monkeypatch.setattr("dijiang.cli.print_line", lambda message: lines.append(str(message)))
    assert pruned_with(*words)[2] == PruneConfig(**DEFAULTS, normalization="mean")
    assert lines == ["normalisation is now called normalization; the former name will be removed"]


def test_help_and_list_of_settings(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = command("prune", "--help")
    assert code == 0 and len(out.splitlines()) <= 24 and max(map(len, out.splitlines())) <= 100
    assert "--list-settings" in out and "--sensitivity" not in out
    code, out, _ = command("prune", "--list-settings")
    assert code == 0
    for field in dataclasses.fields(PruneConfig):
        assert (re.search(rf"^{field.name}\b.*\n.*\w", out, re.MULTILINE) is not None) == field.init


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sparsity", "1.2"), "sparsity=1.2 must lie between 0 and 1, both left out"),
        (("--sparsity", "0.5", "--alpha", "0.6"), "ask for sparsities from -0.1 to 1.1, which must lie from 0 to below 1"),
        (("--score", "obc"), r"score 'obc' is unknown \(did you mean obs\?\); choose from isc, obs, obd"),
        (("--pattern", "2:4", "--sparsity", "0.4"), "pattern 2:4 removes 0.5 of the weights, sparsity=0.4 was asked"),
        (("--pattern", "1:7"), "pattern 1:7 does not fit model.layers.0.self_attn.q_proj: its 32 columns"),
        (("--set", "samplse=3"), r"unknown key samplse \(did you mean samples\?\)"),
        (("--set", "seed=few"), "seed is 'few', expected a whole number"),
        (("--sparsity", "0.4", "--set", "sparsity=0.5"), "sparsity is set twice, by --set and by its own option"),
        (("--config", "none.yaml"), "cannot read none.yaml: No such file or directory"),
        (("--calibration", "none.txt"), "cannot read none.txt: No such file or directory"),
    ],
)
def test_words_that_make_no_sense(fails, words, options, message):
    fails(message, *words, *options)
    fails("nobody/nothing is neither a folder nor a GGUF file.*offline", "prune", "nobody/nothing", *words[2:])


def test_an_interrupted_run_says_how_to_continue(command, words, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:

        def interrupted(decoder, index, *arguments):
            if index == 1:
                raise KeyboardInterrupt
            return prune_layer(decoder, index, *arguments)

        patched.setattr(pruning, "prune_layer", interrupted)
        code, out, err = command(*words)
    assert (code, out) == (130, "") and err.endswith("dijiang: interrupted; run the same command again to continue\n")
    assert "nothing half-written" not in err and not (tmp_path / "out").exists()
    code, _, err = command(*words, "--seed", "1")
    assert code == 1 and re.search(r"^dijiang: .* holds an unfinished run with another seed", err, re.MULTILINE)
    code, out, err = command(*words)
    assert code == 0 and out.endswith(f"wrote {tmp_path / 'out'}\n"), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]

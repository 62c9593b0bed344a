"""Settings of the latency benchmark."""

import subprocess
import sys

import pytest

from dijiang.common.settings import describe, load_settings
from dijiang.evaluate.latency.config import LatencyConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contexts": ()}, r"^contexts \(none\) must be numbers of at least 1, each once$"),
        ({"contexts": (8, 8)}, "^contexts 8, 8 must be"),
        ({"batches": (0, 1)}, "^batches 0, 1 must be"),
        ({"phases": ("prefill", "train")}, "^phases prefill, train are unknown; choose from prefill, decode, each once$"),
        ({"phases": ("decode", "decode")}, "^phases decode, decode are unknown"),
        ({"rounds": 0}, "^rounds=0 must be at least 1$"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LatencyConfig(**settings)


def test_settings_are_read_from_a_file_and_words(tmp_path):
    file = tmp_path / "latency.yaml"
    file.write_text("shape: pythia-70m\ncontexts: [64, 128]\nsettings: {decay: retnet}\n", encoding="utf-8")
    config = load_settings(LatencyConfig, file, ["rounds=3", "settings.attention_window=8"], {"phases": ("decode",)})
    layers = {"decay": "retnet", "attention_window": 8}
    assert config == LatencyConfig(shape="pythia-70m", contexts=(64, 128), settings=layers, rounds=3, phases=("decode",))
    assert config.longest == 128
    with pytest.raises(ValueError, match=r"^phases sleep are unknown"):
        load_settings(LatencyConfig, words=["phases=[sleep]"])


def test_every_setting_is_described():
    assert all(text for _, _, text in describe(LatencyConfig))


def test_settings_can_be_read_without_torch():
    code = "import sys; from dijiang.evaluate import LatencyConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0

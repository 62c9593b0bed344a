"""Settings of the feature map study."""

import subprocess
import sys

import pytest

from dijiang.common.settings import describe, load_settings
from dijiang.evaluate.feature_map_study.config import FeatureMapStudyConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": (0, 16)}, "features=0 must be at least 1"),
        ({"features": (16, -4)}, "features=-4 must be at least 1"),
        ({"features": (16,)}, "a slope needs at least two numbers of features"),
        ({"features": (32, 16)}, "in rising order"),
        ({"features": (16, 16)}, "each once"),
        ({"seeds": 1}, "seeds=1 must be at least 2"),
    ],
)
def test_settings_that_will_not_do(settings, message):
    with pytest.raises(ValueError, match=message):
        FeatureMapStudyConfig(**settings)


def test_settings_are_read_from_words():
    config = load_settings(FeatureMapStudyConfig, words=["features=[3, 8]", "seeds=3"])
    assert config == FeatureMapStudyConfig(features=(3, 8), seeds=3)


def test_every_setting_is_described():
    assert all(text for _, _, text in describe(FeatureMapStudyConfig))


def test_settings_can_be_read_without_torch():
    code = "import sys; import dijiang.evaluate.feature_map_study.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0

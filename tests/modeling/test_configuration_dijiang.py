"""Configs on disk, and settings that a config refuses."""

import pytest
from dijiang_testing.model_checks import tiny_config

from dijiang.modeling import DiJiangConfig


def test_config_round_trip_and_equality(tmp_path):
    config = tiny_config(decay="learned", layer_types=["full_attention", "linear_attention"], rope_parameters={
        "rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 512})  # fmt: skip
    config.save_pretrained(tmp_path)
    assert DiJiangConfig.from_pretrained(tmp_path) == config
    assert tiny_config(hidden_size=96) != tiny_config()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"feature_map": "cosine"}, "feature_map='cosine' is unknown; choose one of wdcf, pff, wpff, ldcf"),
        ({"decay": "gated"}, "decay='gated' is unknown; choose one of none, retnet, learned"),
        ({"layer_types": ["linear_attention"]}, "number of layer|layer_types"),
        ({"layer_types": ["linear_attention", "mamba2"]}, "mamba2"),
        ({"layer_types": ["sliding_attention"] * 2}, "needs sliding_window of at least 1, not None"),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": -4}, "at least 1, not -4"),
        ({"branch_scale_init": float("nan")}, "branch_scale_init=nan must be finite"),
        ({"num_key_value_heads": 4}, "num_attention_heads=6 is not a multiple of num_key_value_heads=4"),
        ({"attention_window": 0}, "attention_sinks=2 needs attention_window of at least 1"),
        ({"attention_window": -1}, "must not be negative"),
        ({"normalize": False}, "normalize=false needs attention_window=0"),
        ({"decay_spans": [4.0]}, r"decay_spans=\[4.0\] must be two finite numbers above 1"),
        ({"decay_spans": [1, 64]}, r"decay_spans=\[1, 64\] must be two"),
        ({"decay_spans": [4, float("inf")]}, "must be two finite"),
        ({"feature_dim": 0}, "feature_dim=0 must be at least 1"),
        ({"state_update": "gated"}, "state_update='gated' is unknown; choose one of sum, delta"),
        (
            {
                "feature_map": "identity",
                "state_update": "delta",
                "normalize": True,
                "attention_memory": 2,
                "attention_window": 3,
            }
            | {"memory_score": "self_recall", "attention_memory": 2},
            "memory_score=self_recall divides by sums of features, and feature_map=identity has features with signs",
        ),
    ],
    ids=str,
)
def test_config_refuses_what_makes_no_sense(overrides, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**overrides)

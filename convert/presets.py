"""Named settings of the linear layers."""

from typing import Any

# what our measurements support: an exact window and sinks, paired softmax features for all older tokens
RECOMMENDED = {
    "feature_map": "wdcf",
    "feature_activation": "softmax",
    "feature_pairs": True,
    "learn_features": True,
    "key_scale": True,
    "scale_features": True,
    "dct_direction": "forward",
    "decay": "none",
    "attention_window": 64,
    "attention_sinks": 4,
    "normalize": True,
    "output_norm": "none",
    "output_gate": False,
}

PRESETS: dict[str, dict[str, Any]] = {
    "recommended": RECOMMENDED,
    # what they support where only a query's own key and the first four are exact (docs/recovery.md): every head forgets at a
    # rate of its own and directions train; the projections must train too, see the recipe smollm2-135m-linear
    "linear": RECOMMENDED
    | {
        "feature_map": "ldcf",
        "decay": "learned",
        "decay_spans": [4, 64],
        "attention_window": 1,
    },
    # the released code of arXiv 2403.19928, with its decay tables in the one form that stays finite
    "paper": {
        "feature_map": "wdcf",
        "feature_activation": "softmax",
        "feature_pairs": False,
        "learn_features": False,
        "key_scale": False,
        "scale_features": False,
        "dct_direction": "inverse",
        "decay": "retnet",
        "attention_window": 0,
        "attention_sinks": 0,
        "normalize": False,
        "output_norm": "group_norm",
        "output_gate": True,
    },
}

"""The DiJiang model. Importing this package registers it with transformers' auto classes, so no remote code is needed."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .cache_dijiang import DiJiangCache
from .configuration_dijiang import FEATURE_MAPS, DiJiangConfig
from .feature_maps import build_feature_map
from .linear_attention import linear_attention
from .modeling_dijiang import DiJiangForCausalLM, DiJiangForSequenceClassification, DiJiangModel, DiJiangPreTrainedModel

AutoConfig.register("dijiang", DiJiangConfig)
DiJiangConfig.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, DiJiangModel),
    (AutoModelForCausalLM, DiJiangForCausalLM),
    (AutoModelForSequenceClassification, DiJiangForSequenceClassification),
):
    auto_class.register(DiJiangConfig, model_class)
    model_class.register_for_auto_class(auto_class.__name__)

__all__ = [
    "FEATURE_MAPS",
    "DiJiangCache",
    "DiJiangConfig",
    "DiJiangForCausalLM",
    "DiJiangForSequenceClassification",
    "DiJiangModel",
    "DiJiangPreTrainedModel",
    "build_feature_map",
    "linear_attention",
]

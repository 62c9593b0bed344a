"""Numbers of weights and operations of a model, counted on its modules, which hold no data."""

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from dijiang.modeling import FEATURE_MAPS, DiJiangForCausalLM
from dijiang.modeling.linear_attention_chunk import CHUNK_SIZE
from dijiang.modeling.linear_attention_layer import ADDED_PARTS, OUTPUT_PARTS, DiJiangLinearAttention
from dijiang.modeling.window_attention import queries_per_block

from ..stages.parameters import PROJECTIONS, added_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """
    Numbers of weights of one model.

    Attributes:
        config: config of the model.
        total: all weights; a tied head counts once.
        added: weights that conversion added to the attention of linear layers and that train.
        fixed: weights that conversion added to the attention of linear layers and that never train.
        output: weights of output norms and gates, which conversion added too.
        projections: weights of the q, k, v and o projections of linear layers, biases included.
        embeddings: weights of the embeddings and the head.
        matrices: weights of all matrices that multiply each token, including the head, even if it is tied.
        head: weights of the head.
        projection_matrices: weights of the matrices of the projections.
        sides: rows plus columns, summed over all matrices that adapters may go to.
        projection_sides: rows plus columns, summed over the matrices of the projections.
        mixing_flops: FLOPs per token of all linear layers between their projections, forward.
        softmax_flops: FLOPs per token, and per token of context, of all softmax layers between their projections, forward.
    """

    config: PretrainedConfig
    total: int
    added: int
    fixed: int
    output: int
    projections: int
    embeddings: int
    matrices: int
    head: int
    projection_matrices: int
    sides: int
    projection_sides: int
    mixing_flops: float
    softmax_flops: float


def model_size(model: DiJiangForCausalLM) -> ModelSize:
    """Count the weights of `model`, which may be on the meta device."""
    config = model.config
    linear = [module for module in model.modules() if isinstance(module, DiJiangLinearAttention)]
    projections = [getattr(layer, name) for layer in linear for name in PROJECTIONS]
    matrices = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    adaptable = [module for module in matrices if type(module) is nn.Linear]
    head = model.lm_head.weight.numel()
    linear_query_heads = sum(len(layer.linear_heads) * layer.num_key_value_groups for layer in linear)
    embeddings = {id(weight): weight.numel() for weight in (model.lm_head.weight, model.model.embed_tokens.weight)}
    added = sum(parameter.numel() for parameter in added_parameters(model).values())
    return ModelSize(
        config=config,
        total=sum(parameter.numel() for parameter in model.parameters()),
        added=added,
        fixed=count_weights(linear, ADDED_PARTS) - added,
        output=count_weights(linear, OUTPUT_PARTS),
        projections=count_weights(linear, PROJECTIONS),
        embeddings=sum(embeddings.values()),
        matrices=sum(module.weight.numel() for module in matrices) + head,
        head=head,
        projection_matrices=sum(module.weight.numel() for module in projections),
        sides=sum(sum(module.weight.shape) for module in adaptable),
        projection_sides=sum(sum(module.weight.shape) for module in projections),
        mixing_flops=sum(chunk_mixing_flops(layer) for layer in linear),
        softmax_flops=2.0 * config.head_dim * (config.num_attention_heads * config.num_hidden_layers - linear_query_heads),
    )


def count_weights(layers: list[DiJiangLinearAttention], names: tuple[str, ...]) -> int:
    """Number of weights in the modules of these names, which a layer may lack."""
    modules = [getattr(layer, name) for layer in layers for name in names]
    return sum(parameter.numel() for module in modules if module is not None for parameter in module.parameters())


def chunk_mixing_flops(layer: DiJiangLinearAttention) -> float:
    """FLOPs per token of one linear layer between its projections, forward, in the chunk form that training uses."""
    G = len(layer.linear_heads)
    H = G * layer.num_key_value_groups
    d = layer.head_dim
    M = layer.feature_map_q.size
    projected = "feature_dim" in FEATURE_MAPS[layer.config.feature_map].settings
    features = 2 * (H + G) * M * d if projected else 0
    state = 2 * H * CHUNK_SIZE * (M + d) + 2 * (H + G) * M * d
    exact = layer.window + layer.sinks + queries_per_block(layer.window) * (2 if layer.has_memory else 1)
    exact += sum(layer.slots) / G
    return features + state + (4 * H * d * exact if layer.window else 0)

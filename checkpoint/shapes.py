"""Shapes of well-known models, so that an estimate or a benchmark needs no network."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from dijiang.common.errors import unknown

# settings in which a config differs from the defaults of transformers
PYTHIA = {"model_type": "gpt_neox", "vocab_size": 50304, "tie_word_embeddings": False}
LLAMA = {"model_type": "llama", "vocab_size": 32000}


def sized(
    family: dict[str, Any], hidden_size: int, intermediate_size: int, layers: int, heads: int, **others: Any
) -> dict[str, Any]:
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": layers}
    return family | sizes | {"num_attention_heads": heads} | others


SHAPES = {
    "HuggingFaceTB/SmolLM2-135M": sized(
        LLAMA, 576, 1536, 30, 9, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True
    ),
    "EleutherAI/pythia-70m": sized(PYTHIA, 512, 2048, 6, 8),
    "EleutherAI/pythia-160m": sized(PYTHIA, 768, 3072, 12, 12),
    "EleutherAI/pythia-410m": sized(PYTHIA, 1024, 4096, 24, 16),
    "EleutherAI/pythia-1b": sized(PYTHIA, 2048, 8192, 16, 8),
    "EleutherAI/pythia-1.4b": sized(PYTHIA, 2048, 8192, 24, 16),
    "EleutherAI/pythia-2.8b": sized(PYTHIA, 2560, 10240, 32, 32),
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": sized(LLAMA, 2048, 5632, 22, 32, num_key_value_heads=4),
    "meta-llama/Llama-2-7b-hf": sized(LLAMA, 4096, 11008, 32, 32),
}

# names that commands accept
SHORT_NAMES = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    **{name.partition("/")[2]: name for name in SHAPES if "/pythia-" in name},
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
}


def shape_config(name: str) -> PretrainedConfig:
    """
    The transformers config of a shape by its short name.

    Raises:
        ValueError: on a name that is unknown.
    """
    if name not in SHORT_NAMES:
        raise unknown("shape", name, SHORT_NAMES)
    return AutoConfig.for_model(**SHAPES[SHORT_NAMES[name]])

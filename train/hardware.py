"""The machines and the models that cost estimates know by name."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """
    One device.

    Attributes:
        memory: GiB that a program can use.
        speed: peak of dense matrix products in the float type it trains in, TFLOP/s.
        bfloat16: whether it has that type in hardware; else it computes in float32.
    """

    memory: float
    speed: float
    bfloat16: bool = True


# memory as the driver shows it, speeds from the makers' data sheets, without sparsity
DEVICES = {
    "h200": Device(memory=140, speed=989),
    "h100": Device(memory=79, speed=989),
    "a100-80gb": Device(memory=79, speed=312),
    "a100-40gb": Device(memory=39, speed=312),
    "l40s": Device(memory=44, speed=362),
    "rtx4090": Device(memory=23.5, speed=165),
    "v100": Device(memory=31.5, speed=15.7, bfloat16=False),
    # two cores of a server processor with matrix units (AMX), as far as small products use them
    "cpu": Device(memory=16, speed=0.6),
}

# the configs of the models that bundled recipes name, as far as they differ from what transformers takes for granted, so that
# an estimate needs no network
PYTHIA = {"model_type": "gpt_neox", "vocab_size": 50304, "tie_word_embeddings": False}
LLAMA = {"model_type": "llama", "vocab_size": 32000}


def sized(family: dict, hidden_size: int, intermediate_size: int, layers: int, heads: int, **others) -> dict:
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
    "EleutherAI/pythia-2.8b": sized(PYTHIA, 2560, 10240, 32, 32),
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": sized(LLAMA, 2048, 5632, 22, 32, num_key_value_heads=4),
    "meta-llama/Llama-2-7b-hf": sized(LLAMA, 4096, 11008, 32, 32),
}

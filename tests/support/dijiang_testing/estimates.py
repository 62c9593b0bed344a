"""Recipes and shapes of models to estimate the cost of."""

from transformers import GPTNeoXConfig, LlamaConfig

from dijiang.train.recipe.schema import (
    AlignConfig,
    ConvertConfig,
    DataConfig,
    DistillConfig,
    Recipe,
    RunConfig,
    SourceConfig,
)

PUBLISHED_SIZES = {
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "EleutherAI/pythia-70m": 70_426_624,
    "EleutherAI/pythia-160m": 162_322_944,
    "EleutherAI/pythia-410m": 405_334_016,
    "EleutherAI/pythia-1b": 1_011_781_632,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": 1_100_048_384,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
}
SMALL = {"vocab_size": 331, "hidden_size": 48, "intermediate_size": 70, "num_hidden_layers": 3, "num_attention_heads": 6}
LLAMA = LlamaConfig(**SMALL, num_key_value_heads=2)
NEOX = GPTNeoXConfig(**SMALL, tie_word_embeddings=False)
TIED = LlamaConfig(**SMALL, num_key_value_heads=3, tie_word_embeddings=True)
BOTH = {"align": {}, "distill": {}}


def build_recipe(source="nowhere", *, align=None, distill=None, settings=None, preset="recommended", **run) -> Recipe:
    return Recipe(
        source=str(source),
        output="out",
        data=DataConfig(train=[SourceConfig(path="text.txt")]),
        convert=ConvertConfig(preset=preset, settings=settings or {}),
        align=None if align is None else AlignConfig(**align),
        distill=None if distill is None else DistillConfig(**distill),
        run=RunConfig(**run),
    )

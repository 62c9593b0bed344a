"""One checkpoint as transformers loads it and as a streamed decoder, and its sensitivities."""

import pytest
import torch
from dijiang_testing.pruned_folders import sizes_of
from transformers import AutoConfig, AutoModelForCausalLM

from dijiang.checkpoint.source import open_source
from dijiang.checkpoint.weights import open_weights
from dijiang.common.result_cache import ResultCache
from dijiang.compress import PruneConfig
from dijiang.compress.oneshot.sensitivity.gradients import measure_gradients
from dijiang.compress.oneshot.sensitivity.measure import measure
from dijiang.compress.streamed_decoder import StreamedDecoder

OPT = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}


@pytest.fixture
def both(make_source, pair, tmp_path):
    """both("llama" | "gpt_neox" | "opt" | "dijiang") -> (transformers' model, streamed decoder) of one checkpoint."""

    def load(family, **options):
        if family == "dijiang":
            folder = pair.checkpoint
        elif family == "opt":  # the only one here whose layers flatten their tokens
            folder = tmp_path / "opt"
            torch.manual_seed(0)
            sizes = {"max_position_embeddings": 64, "word_embed_proj_dim": 32, "init_std": 0.3}
            AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **OPT, **sizes)).save_pretrained(folder)
        else:
            folder, _ = make_source(family, num_key_value_heads=2) if family == "llama" else make_source(family)
        source = open_source(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        return model, StreamedDecoder(source.config, open_weights(source), "it")

    return load


@pytest.fixture
def measured(tmp_path):
    """measured(decoder, blocks, **settings) -> the sensitivities of all matrices, cached in tmp_path."""

    def call(decoder, blocks, **settings):
        config = PruneConfig(calibration=(tmp_path / "unread.txt",), **settings)
        cache, gradients = ResultCache(tmp_path / "cache"), None
        if config.ranked_by_gradients:
            sequences = blocks[: config.sensitivity_samples]
            gradients = measure_gradients(decoder, sequences, {}, by_row=config.by_row, cache=cache)
        arguments = {"gradients": gradients, "identity": "this model", "cache": cache}
        sensitivities = measure(decoder, blocks, sizes_of(decoder), config, **arguments)
        assert list(sensitivities.values) == list(sizes_of(decoder))
        return sensitivities

    return call

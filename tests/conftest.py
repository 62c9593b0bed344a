"""Tiny random sources of every family, a byte-level tokenizer trained here, and a teacher with its conversion."""

import os
import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from dijiang.convert import convert_model

# test files that start processes of their own need the shared helpers there too
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent / "support"), os.environ.get("PYTHONPATH")])
)

VOCAB = 320
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
}
CONFIGS = {"llama": LlamaConfig, "gpt_neox": GPTNeoXConfig, "mistral": MistralConfig}
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="session")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(["the cat sat on the mat, and the rat sat on the cat"] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    made.chat_template = TEMPLATE
    return made


def randomize(model, seed: int):
    """Random values for every parameter, biases and norms included, so that no two could be swapped unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                parameter.copy_(noise * (1.0 if "embed_" in name else 2.0 * parameter.shape[1] ** -0.5))
            else:
                parameter.copy_(0.3 * noise + (1.0 if name.endswith("norm.weight") else 0.0))
    return model.eval()


def write_source(folder: Path, tokenizer, family="llama", *, seed=0, dtype=torch.float32, max_shard_size="5GB", **settings):
    """A random model of `family` in `folder`, with the tokenizer; returns the transformers model."""
    model = randomize(AutoModelForCausalLM.from_config(CONFIGS[family](**(SIZES | settings))), seed).to(dtype)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=3)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture
def make_source(tmp_path, tokenizer):
    """make_source("llama", seed=0, dtype=..., name="source", max_shard_size=..., **config) -> (folder, transformers model)."""

    def make(family="llama", *, name="source", **settings):
        return tmp_path / name, write_source(tmp_path / name, tokenizer, family, **settings)

    return make


class Pair(NamedTuple):
    """Folders of a softmax model and of its conversion, to read only: they are shared by all tests."""

    teacher: Path
    checkpoint: Path


@pytest.fixture(scope="session")
def pair(tmp_path_factory, tokenizer) -> Pair:
    """A LLaMA with grouped heads, and its conversion with a short window, of which a block of 20 tokens sees the end."""
    return write_pair(tmp_path_factory.mktemp("pair"), tokenizer)


@pytest.fixture(scope="session")
def long_pair(tmp_path_factory, tokenizer) -> Pair:
    """The same, made for 1,024 tokens, which samples of recall need."""
    return write_pair(tmp_path_factory.mktemp("long_pair"), tokenizer, max_position_embeddings=1024)


def write_pair(folder: Path, tokenizer, **shape) -> Pair:
    write_source(folder / "teacher", tokenizer, num_key_value_heads=2, **shape)
    settings = {"attention_window": 4, "attention_sinks": 2, "branch_scale_init": 0.5}
    convert_model(folder / "teacher", folder / "checkpoint", progress=False, **settings)
    return Pair(folder / "teacher", folder / "checkpoint")


@pytest.fixture(scope="session")
def long_teacher(tmp_path_factory, tokenizer) -> Path:
    """The folder of a softmax model that was made for 256 tokens, to read only."""
    folder = tmp_path_factory.mktemp("long") / "teacher"
    write_source(folder, tokenizer, num_key_value_heads=2, max_position_embeddings=256)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """1,000 words, some 1,800 tokens, to read only."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(random.Random(0).choices("the cat sat on mat and rat".split(), k=1000)), encoding="utf-8")
    return path


@pytest.fixture
def refused():
    """refused(folder, call, message): `call()` raises ValueError with one line that matches, and leaves `folder` as it was."""

    def check(folder: Path, call, message: str) -> None:
        before = sorted(folder.rglob("*"))
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 900
        assert sorted(folder.rglob("*")) == before

    return check


@pytest.fixture
def tokens():
    """tokens(length, rows=2) -> token ids (rows, length)."""
    return lambda length, rows=2: torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))

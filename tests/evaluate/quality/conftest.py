"""A tokenizer with words of one token, which recall samples are made of."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dijiang.evaluate.quality.recall_samples import CITIES


def made_words(count: int) -> list[str]:
    rng = random.Random(3)
    return ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(3, 7))) for _ in range(count)]


@pytest.fixture(scope="session", params=["byte-level", "sentencepiece"])
def wordy(request):
    """A tokenizer of either kind with some 150 words of one token."""
    byte_level = request.param == "byte-level"
    bpe = Tokenizer(models.BPE())
    if byte_level:
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else list("\n=.:-0123456789")
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
    sentence = "The secret number of {} is".format(" ".join(CITIES))
    bpe.train_from_iterator(
        [" " + " ".join(made_words(150)), sentence, " Once Upon x1y thé", "Item code sequence one two three four five six"]
        * 3,
        trainer,
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")

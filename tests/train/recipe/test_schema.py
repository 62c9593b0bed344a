"""Values that a recipe's dataclasses refuse."""

import pytest
from dijiang_testing.recipes import ALIGN, DATA, HEAD, SMALL

from dijiang.train import AlignConfig


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + DATA + "align: {tokens: 64}\n", r"align: tokens=64 is less than one step"),
        (HEAD + DATA + "distill: {kl_weight: 0}\n", "distill: kl_weight and ce_weight are both 0: no loss is left$"),
        (HEAD + DATA + "distill: {lora_alpha: 8}\n", "distill: lora_alpha=8.0 needs lora_rank of at least 1$"),
        (HEAD + DATA + "distill: {trains: kernel, lora_rank: 8}\n", "distill: lora_rank=8 needs trains=attention or all"),
        (SMALL + "run: {keep_checkpoints: 1}\n", "run: keep_checkpoints=1 must be at least 2$"),
        (SMALL + "run: {log_every: 0}\n", "run: log_every=0 must be greater than 0$"),
        (SMALL + "run: {max_minutes: -0.5}\n", "run: max_minutes=-0.5 must not be negative$"),
        (HEAD + DATA + "align: {warmup_share: 1.5}\n", "align: warmup_share=1.5 must lie between 0 and 1$"),
        (HEAD + DATA + "align: {window_dropout: -0.5}\n", "align: window_dropout=-0.5 must lie between 0 and 1$"),
        (HEAD + DATA + "align: {start_block_size: 0}\n", "align: start_block_size=0 must be greater than 0$"),
        (HEAD + DATA + "align: {start_block_size: 96}\n", "align: start_block_size=96 must be block_size=1024 halved"),
        (HEAD + DATA + "align: {position_range: 1023}\n", "align: position_range=1023 must be at least block_size=1024$"),
        (HEAD + "data: {train: [{path: a, weight: 0}, b]}\n" + ALIGN, r"data\.train\.0: weight=0\.0 must be greater than 0$"),
    ],
)
def test_values_that_make_no_sense(complains, text, message):
    complains(text, message)


def test_a_former_name_still_works_in_the_constructor():
    with pytest.warns(FutureWarning, match=r"^quiet is now called branch_scale_offset"):
        assert AlignConfig(quiet=0.25) == AlignConfig(branch_scale_offset=0.25)

"""Settings of an evaluation: what fits a context, what is refused, how they are read."""

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from dijiang.common.settings import describe, load_settings
from dijiang.evaluate import EvaluationConfig


def test_what_was_not_asked_for_fits_the_context(config):
    free = replace(config, lengths=None, recall_lengths=None, prompt_length=100, new_tokens=8, map_tokens=512)
    fitted = free.within(300)
    assert (fitted.lengths, fitted.recall_lengths) == ((300,), (128, 256))
    assert (fitted.prompt_length, fitted.map_tokens) == (100, 300) and free.within(64).prompt_length == 56
    assert free.within(4096).lengths == (1024,) and free.within(4096).recall_lengths == (128, 256, 512, 1024)
    assert replace(free, recall_lengths=()).within(300).recall_lengths == ()
    quick = replace(free, stride=512).quick()
    assert quick.stride == 256 and quick.within(200).lengths == (200,) and quick.within(100).recall_lengths == ()
    assert replace(free, lengths=(512, 64), recall_lengths=(256, 300)).quick().within(2048).lengths == (512,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"texts": ()}, "^no text given; name at least one text file$"),
        ({"lengths": (24, 0)}, "^lengths holds 0, which must be at least 1$"),
        ({"prompts": 0}, "^prompts=0 must be at least 1$"),
        ({"batch_size": -1}, "^batch_size=-1 must be at least 1$"),
        ({"map_tokens": -1}, "^map_tokens=-1 must be at least 0$"),
        ({"num_fewshot": -1}, "^num_fewshot=-1 must be at least 0$"),
        ({"lengths": (9, 9)}, "^lengths holds 9 twice; give each once$"),
    ],
)
def test_settings_without_sense_are_refused(config, refused, tmp_path, settings, message):
    refused(tmp_path, lambda: replace(config, **settings), message)


def test_settings_are_read_from_a_file_and_words(tmp_path):
    (tmp_path / "evaluation.yaml").write_text("texts: [a.txt, b.txt]\nlengths: [64, 128]\ntext_tokens: null\n")
    settings = load_settings(EvaluationConfig, tmp_path / "evaluation.yaml", ["lengths=[32]", "recall_lengths=[]", "limit=5"])
    expected = {
        "texts": (Path("a.txt"), Path("b.txt")),
        "text_tokens": None,
        "lengths": (32,),
        "recall_lengths": (),
        "limit": 5,
    }
    assert settings == EvaluationConfig(**expected)
    with pytest.raises(ValueError, match=r"^unknown key recal_samples \(did you mean recall_samples\?\)"):
        load_settings(EvaluationConfig, words=["texts=[a]", "recal_samples=3"])


def test_every_setting_is_described():
    described = describe(EvaluationConfig)
    assert [name for name, _, _ in described] == [field.name for field in fields(EvaluationConfig)]
    assert all(text for _, _, text in described)


def test_settings_need_no_torch(tmp_path):
    code = "import sys, dijiang.evaluate.quality.config; print({'torch', 'transformers', 'numpy', 'rich'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

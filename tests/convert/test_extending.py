"""A new source family: the file that docs/extending.md shows, registered in one place, converts end to end."""

from types import ModuleType

import pytest
import torch
from dijiang_testing.doc_commands import ROOT, titled_blocks
from transformers import AutoModelForCausalLM, Starcoder2Config

from dijiang.convert import convert_model, load_source
from dijiang.convert.families import FAMILIES
from dijiang.modeling import DiJiangForCausalLM

SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def starcoder2(tmp_path, tokenizer):
    """The folder of a random StarCoder2, whose biases are not zero, and the model itself."""
    torch.manual_seed(0)
    config = Starcoder2Config(**SIZES, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    return tmp_path / "source", model


@pytest.fixture
def family(monkeypatch):
    """Registers the family of the page."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    module = ModuleType("starcoder2")
    exec(titled_blocks(page)["convert/families/starcoder2.py"], module.__dict__)
    monkeypatch.setitem(FAMILIES, "starcoder2", module)


def test_a_family_that_nobody_registered_is_refused(starcoder2, tmp_path):
    with pytest.raises(ValueError, match="model_type 'starcoder2', which is not supported"):
        convert_model(starcoder2[0], tmp_path / "output", progress=False)


def test_a_registered_family_converts_end_to_end(family, starcoder2, tmp_path, tokens):
    source, model = starcoder2
    teacher, _ = load_source(source)
    with torch.no_grad():
        expected = model(tokens(20)).logits
        assert expected.std() > 0.5
        assert (teacher(tokens(20)).logits - expected).abs().max() < 1e-4
    student = DiJiangForCausalLM.from_pretrained(convert_model(source, tmp_path / "output", progress=False))
    assert set(student.config.layer_types) == {"linear_attention"}
    generated = student.generate(tokens(8), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert generated.shape == (2, 14)

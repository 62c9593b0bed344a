"""A new feature map is one class and one line that registers it: nothing else has to know its name."""

import pytest
import torch
from dijiang_testing.model_checks import assert_close, features, random_ids, rows, set_mode, tiny_config, tiny_model

from dijiang.modeling import FEATURE_MAPS, DiJiangForCausalLM, build_feature_map
from dijiang.modeling.feature_map_base import FeatureMap, register_feature_map


class Squares(FeatureMap):
    """phi(x) = (W x)^2, W (H, m, d): the square of any projection. Input (B, T, H, d), output (B, T, H, m)."""

    settings = ("feature_dim", "feature_seed", "learn_features")

    def __init__(self, config, num_heads, seed):
        super().__init__(config, num_heads, seed)
        self.add_parameters(W=(self.feature_dim, self.head_dim))

    @property
    def size(self):
        return self.feature_dim

    def initial_values(self):
        return {"W": rows(self.feature_dim, self.head_dim, seed=self.seed)}

    def forward(self, x, positions=None, scale=1.0):
        return self.project(x, self.weight("W"), scale=scale).square()


class Projection(Squares):
    """phi(x) = W x, whose features can be negative."""

    positive = False

    def forward(self, x, positions=None, scale=1.0):
        return self.project(x, self.weight("W"), scale=scale)


@pytest.fixture(autouse=True)
def registered():
    register_feature_map("squares")(Squares)
    register_feature_map("projection")(Projection)
    yield
    del FEATURE_MAPS["squares"], FEATURE_MAPS["projection"]


def test_the_new_map_is_what_the_config_selects():
    feature_map = build_feature_map(tiny_config(feature_map="squares"), 3, seed=1)
    x = rows(2, 5, 3, 8)
    assert type(feature_map) is Squares
    assert_close(features(feature_map, x), (x @ rows(11, 8, seed=1).T).square(), "phi")


@pytest.mark.parametrize("settings", [
    {"feature_map": "squares", "decay": "learned"},
    {"feature_map": "squares", "attention_window": 0, "attention_sinks": 0},
    {"feature_map": "projection", "normalize": False, "attention_window": 0, "attention_sinks": 0, "decay": "retnet"},
], ids=str)  # fmt: skip
def test_a_model_with_the_new_map_trains_generates_saves_and_loads(tmp_path, settings):
    model, ids = tiny_model(**settings), random_ids(2, 40)
    expected = model(ids, labels=ids, use_cache=False)
    expected.loss.backward()
    for name in ("feature_map_q.W", "feature_map_k.W"):
        assert model.get_parameter(f"model.layers.0.self_attn.{name}").grad.any()
    for mode in ("naive", "recurrent"):
        set_mode(model, mode)
        assert_close(model(ids, use_cache=False).logits, expected.logits, mode, tolerance=1e-4)
    set_mode(model, None)
    cached, plain = (model.generate(ids[:, :9], max_new_tokens=20, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, plain)
    model.save_pretrained(tmp_path)
    assert torch.equal(DiJiangForCausalLM.from_pretrained(tmp_path)(ids, use_cache=False).logits, expected.logits)


def test_configs_know_the_new_maps():
    with pytest.raises(Exception, match=r"unknown; choose one of wdcf, .*, identity, squares, projection"):
        tiny_config(feature_map="cubes")
    with pytest.raises(Exception, match=r"feature_map=projection has negative features, whose sum is no denominator"):
        tiny_config(feature_map="projection")


def test_a_config_that_was_made_before_the_maps_were_imported_is_checked_when_a_map_is_built(monkeypatch):
    """As in a process that loads config.json by remote code, without the model's files."""
    known = dict(FEATURE_MAPS)
    monkeypatch.setattr("dijiang.modeling.configuration_dijiang.FEATURE_MAPS", {})
    unknown, signed = tiny_config(feature_map="cubes"), tiny_config(feature_map="projection")
    monkeypatch.setattr("dijiang.modeling.configuration_dijiang.FEATURE_MAPS", known)
    with pytest.raises(ValueError, match=r"^feature_map='cubes' is unknown"):
        build_feature_map(unknown, 3, 0)
    with pytest.raises(ValueError, match=r"^feature_map=projection has negative features"):
        build_feature_map(signed, 3, 0)

"""Our methods fit those of the libraries' classes that they replace, in the version that is installed."""

import inspect

import pytest
from transformers import GenerationMixin, Trainer
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from dijiang.modeling import DiJiangForCausalLM
from dijiang.modeling.cache_dijiang import LinearStateLayer
from dijiang.train.trainer.library_hooks import HOOKS, refuse_renamed_hooks
from dijiang.train.trainer.trainer import RecoveryTrainer

CACHE_METHODS = ("get_seq_length", "get_mask_sizes", "reorder_cache", "batch_repeat_interleave", "batch_select_indices")
REPLACED = [
    *((RecoveryTrainer, Trainer, name) for name in HOOKS),
    *((DiJiangForCausalLM, GenerationMixin, f"{name}_for_generation") for name in ("prepare_inputs", "_prepare_cache")),
    *((LinearStateLayer, DynamicLayer, name) for name in CACHE_METHODS),
    *((LinearStateLayer, CacheLayerMixin, name) for name in sorted(CacheLayerMixin.__abstractmethods__)),
]


@pytest.mark.parametrize(("ours", "base", "name"), REPLACED, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_our_method_takes_what_the_one_it_replaces_takes(ours, base, name):
    expected = list(inspect.signature(getattr(base, name)).parameters.values())
    given = [p for p in expected if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    positional = [p.name for p in given if p.kind is not p.KEYWORD_ONLY and p.default is p.empty]
    optional = {p.name: None for p in given if p.name not in positional}
    inspect.signature(getattr(ours, name)).bind(*positional, **optional)
    inspect.signature(getattr(ours, name)).bind(*positional)


def test_every_method_of_ours_that_trainer_has_is_listed():
    own = {name for name, value in vars(RecoveryTrainer).items() if inspect.isfunction(value)}
    assert {name for name in own if hasattr(Trainer, name)} - {"__init__"} == set(HOOKS)


def test_a_trainer_looks_for_them(monkeypatch):
    def refuse():
        raise ValueError("renamed")

    monkeypatch.setattr("dijiang.train.trainer.trainer.refuse_renamed_hooks", refuse)
    with pytest.raises(ValueError, match="renamed"):
        RecoveryTrainer(None, None)


def test_trainer_without_one_of_them_is_refused():
    refuse_renamed_hooks()
    methods = {name: None for name in HOOKS if name != "_get_output_dir"}
    with pytest.raises(ValueError, match=r"has no Trainer._get_output_dir, so checkpoints would appear before"):
        refuse_renamed_hooks(type("Renamed", (), methods))

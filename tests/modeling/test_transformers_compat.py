"""What forward takes from any version of transformers, and what it refuses by name."""

import inspect
import logging

import pytest
import torch
from dijiang_testing.model_checks import assert_close, random_ids, tiny_config, tiny_model
from peft import PromptTuningConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dijiang.modeling import DiJiangCache, DiJiangForCausalLM, DiJiangForSequenceClassification, DiJiangModel
from dijiang.modeling.transformers_compat import (
    CACHE_NAME,
    EXTRA_ARGUMENTS,
    TESTED_TRANSFORMERS,
    one_cache,
    warn_of_untested_version,
)

CLASSES = (DiJiangModel, DiJiangForCausalLM, DiJiangForSequenceClassification)
SOFTMAX = {"layer_types": ["full_attention"] * 2}


@pytest.fixture
def warnings_of_ours():
    """The messages of our logger, which stands below transformers' own."""
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers.dijiang")
    logger.addHandler(handler)
    type(logger).warning_once.cache_clear()
    yield messages
    logger.removeHandler(handler)


def build(model_class, **overrides):
    torch.manual_seed(0)
    return model_class(tiny_config(**overrides)).eval()


@pytest.mark.parametrize("overrides", [{}, SOFTMAX], ids=["linear", "softmax"])
@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("name", ["kv_cache", "cache_params", "attention_masks", "label", "position_id"])
def test_unknown_keyword_is_refused_with_the_accepted_names(model_class, name, overrides):
    model, ids = build(model_class, **overrides), random_ids(1, 7)
    with pytest.raises(
        TypeError, match=rf"{model_class.__name__}.forward\(\) got an unknown keyword argument: {name}; "
    ) as error:
        model(ids, **{name: None})
    accepted = str(error.value).split("it accepts ")[1].split(", ")
    assert {"input_ids", "attention_mask", "position_ids", "past_key_values", "cache", "use_cache", *EXTRA_ARGUMENTS} <= set(
        accepted
    )
    assert ("labels" in accepted) == (model_class is not DiJiangModel)


@pytest.mark.parametrize("model_class", CLASSES)
def test_every_extra_keyword_is_accepted(model_class):
    model, ids = build(model_class), random_ids(1, 7)
    bounds = torch.tensor([0, 4, 7], dtype=torch.int32)
    values = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "is_causal": True, "debug_io": False, "return_dict": True}
    for name in EXTRA_ARGUMENTS:
        model(ids, **{name: values.get(name)})
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 3


def test_extras_of_the_loss_change_it():
    model, ids = build(DiJiangForCausalLM), random_ids(2, 7)
    mean = model(ids, labels=ids).loss
    assert_close(model(ids, labels=ids, num_items_in_batch=torch.tensor(24)).loss, mean / 2, "sum over 24")
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    assert_close(model(ids, labels=ids, shift_labels=shifted).loss, mean, "labels shifted by the caller")
    assert torch.isfinite(model(ids, labels=ids, ignore_index=int(ids[0, 1])).loss)
    assert not torch.equal(model(ids, labels=ids, ignore_index=int(ids[0, 1])).loss, mean)


@pytest.mark.parametrize("overrides", [{}, SOFTMAX], ids=["linear", "softmax"])
@torch.no_grad()
def test_cache_is_taken_under_either_name(overrides):
    model, ids = tiny_model(seed=1, **overrides), random_ids(2, 12)
    expected = model(ids, use_cache=False).logits[:, 8:]
    for name in ("past_key_values", "cache"):
        for body, head in ((model.model, model.lm_head), (model, torch.nn.Identity())):
            cache = DiJiangCache(model.config)
            body(ids[:, :8], **{name: cache})
            output = body(ids[:, 8:], **{name: cache})
            assert output[CACHE_NAME] is cache and cache.get_seq_length() == 12
            assert_close(head(output[0]), expected, f"{name} of {type(body).__name__}", tolerance=1e-4)
    cache = DiJiangCache(model.config)
    model(ids, past_key_values=cache, cache=cache)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, past_key_values=cache, cache=DiJiangCache(model.config))


def test_one_cache_takes_what_is_there():
    first, second = object(), object()
    assert one_cache(None, None) is None
    assert one_cache(first, None) is one_cache(None, first) is one_cache(first, first) is first
    with pytest.raises(ValueError, match="give one"):
        one_cache(first, second)


def test_prepared_inputs_are_taken_by_forward_under_either_name():
    model, ids = tiny_model(seed=1), random_ids(2, 9)
    for name in ("past_key_values", "cache"):
        cache = DiJiangCache(model.config)
        inputs = model.prepare_inputs_for_generation(ids, is_first_iteration=True, use_cache=True, **{name: cache})
        assert inputs[CACHE_NAME] is cache
        model(**inputs)
        assert cache.get_seq_length() == 9


def test_linear_layers_refuse_to_look_ahead_and_softmax_layers_may():
    ids = random_ids(1, 7)
    with pytest.raises(ValueError, match="is_causal=False: linear layers are causal"):
        build(DiJiangModel)(ids, is_causal=False)
    build(DiJiangModel, **SOFTMAX)(ids, is_causal=False)


def test_gradient_checkpointing_leaves_a_cache_alone():
    """The cache would be filled twice, once more while gradients are computed; transformers knows it by its name."""
    model, ids = build(DiJiangForCausalLM).train(), random_ids(1, 9)
    model.gradient_checkpointing_enable()
    cache = DiJiangCache(model.config)
    model(ids, labels=ids, **{CACHE_NAME: cache}).loss.backward()
    assert cache.get_seq_length() == 0


def test_attention_functions_see_positions():
    """FlashAttention has no mask for packed rows: it reads their bounds from the positions."""
    seen = []

    def note(module, q, k, v, attention_mask, position_ids=None, **kwargs):
        seen.append(position_ids)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("note_positions", note)
    try:
        model, positions = build(DiJiangForCausalLM, **SOFTMAX), torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
        model.config._attn_implementation = "note_positions"
        model(random_ids(1, 7), position_ids=positions)
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("note_positions")
    assert len(seen) == 2 and all(torch.equal(x, positions) for x in seen)


def test_trainer_predicts_logits_alone(tmp_path):
    """Whatever the cache is called, it is not among the predictions."""
    items = [{"input_ids": x, "labels": x, "attention_mask": torch.ones_like(x)} for x in random_ids(3, 9)]
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, use_cache=True)
    predictions = Trainer(build(DiJiangForCausalLM), arguments).predict(items).predictions
    assert predictions.shape == (3, 9, 97)


@pytest.mark.parametrize(("version", "warned"), [
    (f"{TESTED_TRANSFORMERS[0]}.0", False), (f"{TESTED_TRANSFORMERS[1]}.7", False), ("5.17.0.dev0", False),
    ("5.24rc1", False), ("5.8.1", True), ("5.99.0", True), ("6.0rc1", True), ("6", True), ("unknown", True),
])  # fmt: skip
def test_versions_that_were_not_tested_are_warned_of_once(warnings_of_ours, version, warned):
    warn_of_untested_version(version)
    warn_of_untested_version(version)
    assert len(warnings_of_ours) == warned
    assert all("tested with transformers 5.9 to" in message and "refresh-code" in message for message in warnings_of_ours)


def test_loading_a_model_warns(warnings_of_ours, monkeypatch, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert warnings_of_ours == []
    monkeypatch.setattr(warn_of_untested_version, "__defaults__", ("5.99.1",))
    DiJiangForCausalLM.from_pretrained(tmp_path)
    DiJiangForCausalLM.from_pretrained(tmp_path)
    assert len(warnings_of_ours) == 1 and "5.99.1 is installed" in warnings_of_ours[0]


def test_keywords_that_transformers_lists_are_accepted():
    """The next one that transformers renames or adds is seen here first."""
    from transformers.utils import TransformersKwargs

    named = inspect.signature(DiJiangForCausalLM.forward).parameters
    assert set(TransformersKwargs.__annotations__) - named.keys() - EXTRA_ARGUMENTS.keys() == set()


def test_caches_stay_on_their_devices_under_either_name():
    """accelerate moves all other arguments to where an offloaded layer runs."""
    assert {"past_key_values", "cache"} <= set(tiny_model()._skip_keys_device_placement)


def test_prompt_tuning_generates_the_same_text_with_and_without_cache():
    """PEFT puts its virtual prompt before the first tokens alone, which it knows by the cache under its old name."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(seed=1), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    ids, options = random_ids(2, 9), {"max_new_tokens": 9, "do_sample": False}
    texts = [model.generate(input_ids=ids, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*texts)

"""What trains, in which dtype and group, and the loss between student and teacher."""

import pytest
import torch
import torch.nn.functional as F
from dijiang_testing.model_checks import assert_close, random_ids, tiny_model

from dijiang.modeling.linear_attention_layer import linear_layers
from dijiang.train.recipe.schema import DistillConfig
from dijiang.train.stages.adapters import merged_state
from dijiang.train.stages.base import next_token_labels
from dijiang.train.stages.distill import DistillModel
from dijiang.train.stages.parameters import added_parameters

FULL = ["full_attention", "full_attention"]
HYBRID = ["full_attention", "linear_attention"]
PAPER = {"output_norm": "group_norm", "output_gate": True, "decay": "retnet", "learn_features": False}


def config(**settings) -> DistillConfig:
    return DistillConfig(**{"tokens": 64, "block_size": 32, "chunk_tokens": 7} | settings)


def build(dtype=torch.float32, *, settings=None, teacher=True, **overrides) -> DistillModel:
    softmax = tiny_model(7, layer_types=FULL).to(dtype) if teacher else None
    return DistillModel(tiny_model(1, **overrides).to(dtype), softmax, config(**settings or {}), dtype).train()


def packed_rows(seed=0):
    """input_ids and position_ids (2, 19), two documents in the second row."""
    positions = torch.arange(19).repeat(2, 1)
    positions[1, 7:] = torch.arange(12)
    return random_ids(2, 19, seed), positions


def test_the_teachers_loss_on_text_is_its_cross_entropy_within_documents():
    model, (input_ids, positions) = build(), packed_rows()
    labels, teacher = next_token_labels(input_ids, positions), tiny_model(7, layer_types=FULL)
    assert (labels == -100).sum() == 3
    logits = teacher(input_ids, position_ids=positions, use_cache=False).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert_close(model.teacher_measured(input_ids, positions)["loss"], expected, "loss")
    assert (model.measured(input_ids, positions)["loss"] - expected).abs() > 1e-3


def trained(model) -> set[str]:
    return {name.removeprefix("student.") for name, p in model.named_parameters() if p.requires_grad}


def names(model, *parts: str) -> set[str]:
    return {name for name, _ in model.student.named_parameters() if any(part in name for part in parts)}


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize("types", [None, HYBRID])
def test_what_trains(types):
    model = build(settings={"trains": "kernel"}, layer_types=types)
    kernel = set(added_parameters(model.student))
    assert trained(model) == kernel
    layers = [1] if types else [0, 1]
    linear = {name for i in layers for name in names(model, *(f"layers.{i}.self_attn.{part}" for part in PROJECTIONS))}
    assert trained(build(settings={"trains": "attention"}, layer_types=types)) == kernel | linear
    embeddings = {"model.embed_tokens.weight", "lm_head.weight"}
    everything = names(model, "")
    assert trained(build(layer_types=types)) == everything - embeddings
    assert trained(build(settings={"train_embeddings": True}, layer_types=types)) == everything


@pytest.mark.parametrize("trains", ["kernel", "attention", "all"])
def test_fixed_kernels_stay_and_what_conversion_added_beside_them_trains(trains):
    model = build(settings={"trains": trains}, **PAPER, attention_window=0, attention_sinks=0, key_scale=False)
    assert not added_parameters(model.student)
    added = names(model, "output_norm", "output_gate")
    assert added <= trained(model) and not trained(model) & names(model, "feature_map", "decay")
    groups = {group["name"]: group["params"] for group in model.parameter_groups()}
    assert "kernel" not in groups
    assert {id(model.student.get_parameter(name)) for name in added} <= {id(p) for p in groups["attention"]}


def test_adapters_stand_in_for_the_matrices():
    kernel, own = set(added_parameters(tiny_model(1))), tiny_model(1)
    matrices = {name.removesuffix(".weight") for name, p in own.named_parameters() if "_proj" in name}
    for trains, expected in (("all", matrices), ("attention", {name for name in matrices if "self_attn" in name})):
        model = build(settings={"trains": trains, "lora_rank": 2})
        adapters = {name.partition(".lora_")[0] for name in trained(model) if ".lora_" in name}
        assert adapters == expected and {name for name in trained(model) if ".lora_" not in name} == kernel
        assert model.student.get_submodule("model.layers.0.self_attn.q_proj").scaling == {"default": 2.0}
        assert merged_state(model.student).keys() == kernel | {f"{name}.weight" for name in expected}
    # more matrices than peft compares one by one
    settings = {"trains": "attention", "lora_rank": 2, "lora_alpha": 3.0}
    hybrid = build(settings=settings, layer_types=HYBRID * 6, num_hidden_layers=12)
    adapters = {name.partition(".lora_")[0] for name in trained(hybrid) if ".lora_" in name}
    assert adapters == {f"model.layers.{i}.self_attn.{part}" for i in range(1, 12, 2) for part in PROJECTIONS}
    assert hybrid.student.get_submodule("model.layers.1.self_attn.q_proj").scaling == {"default": 1.5}


@pytest.mark.parametrize("settings", [{}, {"trains": "attention"}, {"lora_rank": 2}, {"train_embeddings": True}])
def test_groups_hold_every_trained_parameter_once_at_its_rate(settings):
    rates = {"kernel_learning_rate": 3.0, "attention_learning_rate": 2.0, "learning_rate": 1.0}
    model = build(settings=settings | rates, tie_word_embeddings=True)
    groups = {group["name"]: group for group in model.parameter_groups()}
    assert {name: group["lr"] for name, group in groups.items()} == {
        name: lr for name, lr in (("kernel", 3.0), ("attention", 2.0), ("rest", 1.0)) if name in groups
    }
    found = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert ("rest" in groups) == (settings.get("trains") != "attention")
    by_id = {id(p): name for name, p in model.named_parameters()}
    assert all(("self_attn" in by_id[id(p)]) == (name != "rest") for name, g in groups.items() for p in g["params"])


MIXTURES = [{}, {"trains": "attention"}, {"trains": "kernel"}, {"lora_rank": 2}, {"train_embeddings": True}]
SHAPES = [
    {},
    {"tie_word_embeddings": True, "decay": "learned", "output_norm": "group_norm", "output_gate": True},
    {"norm_type": "layer_norm", "mlp_type": "plain", "attention_bias": True, "mlp_bias": True, "layer_types": HYBRID},
]


@pytest.mark.parametrize("settings", MIXTURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_computations_with_float32_weights_that_train(settings, shape):
    """Losses and gradients near float32's; every trained parameter gets a gradient, no frozen one does."""
    ids, positions = packed_rows()
    settings = settings | {"ce_weight": 0.3}
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build(dtype, settings=settings, **shape)
        for name, p in model.named_parameters():
            kernel = any(part in name for part in ("feature_map", "branch_scale", "key_scale", "decay"))
            assert p.dtype == (torch.float32 if p.requires_grad or kernel else dtype), name
        measures = model(ids, positions)
        measures["loss"].backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        gradient = torch.cat([p.grad.float().flatten() for group in model.parameter_groups() for p in group["params"]])
        found[dtype] = measures, gradient
    (exact, right), (rough, near) = found.values()
    assert rough.keys() == {"loss", "kl", "ce"} and not rough["kl"].requires_grad
    assert all(abs(rough[key] - exact[key]) < 0.03 * exact[key] for key in exact)
    assert F.cosine_similarity(near, right, dim=0) > 0.98


def test_adapters_are_merged_into_the_weights_as_they_are_stored():
    student = tiny_model(1)
    expected = student.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model = DistillModel(student, None, config(lora_rank=2, trains="attention"), torch.bfloat16)
    assert student.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    merged = merged_state(model.student)["model.layers.0.self_attn.q_proj.weight"]  # adapters start at nothing
    assert merged.dtype == torch.float32 and torch.equal(merged, expected)


@pytest.mark.parametrize("seed", range(2))
def test_loss_is_that_of_the_logits_of_both(seed):
    ids, positions = packed_rows(seed)
    model = build(settings={"ce_weight": 0.6, "kl_weight": 0.8, "temperature": 1.7})
    out = model(ids, positions)
    with torch.no_grad():
        # the documents apart, each as a row of its own
        parts = [ids[:1], ids[1:, :7], ids[1:, 7:]]
        s, t = (torch.cat([m(part).logits[0] for part in parts]) for m in (model.student, model.teacher))
    kl = F.kl_div((s / 1.7).log_softmax(-1), (t / 1.7).log_softmax(-1), log_target=True, reduction="batchmean") * 1.7**2
    targets = torch.cat([F.pad(part[0, 1:], (0, 1), value=-100) for part in parts])
    ce = F.cross_entropy(s, targets, reduction="sum")
    assert abs(out["kl"] - kl) < 1e-4 * kl and abs(out["ce"] - ce / 35) < 1e-4 * out["ce"]
    assert abs(out["loss"] - (0.8 * kl + 0.6 * ce / 38)) < 1e-4 * out["loss"]
    model.eval()
    assert model(ids, positions).keys() == {"loss"} and abs(model(ids, positions)["loss"] - ce / 35) < 1e-4 * out["ce"]


def test_all_the_tokens_on_disk_are_as_good_as_the_teacher():
    ids, positions = packed_rows()
    model, alone = build(), build(teacher=False)
    t = model.teacher.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    logprobs, top = model.teacher.lm_head(t).log_softmax(-1).topk(97)
    found = alone(ids, positions, teacher_ids=top, teacher_logprobs=logprobs.detach())
    assert abs(found["loss"] - model(ids, positions)["loss"]) < 1e-5
    with pytest.raises(ValueError, match="needs a teacher"):
        alone(ids, positions)
    assert alone.eval()(ids, positions).keys() == {"loss"}


def test_cross_entropy_alone_needs_no_teacher():
    ids, _ = packed_rows()
    model = build(teacher=False, settings={"kl_weight": 0.0, "ce_weight": 2.0})
    out = model(ids)
    right = model.student(ids, labels=ids).loss
    assert out.keys() == {"loss", "ce"} and abs(out["ce"] - right) < 1e-5 * right
    assert abs(out["loss"] - 2 * right * 18 / 19) < 1e-5 * right


def test_means_of_equal_batches_are_the_mean_of_both():
    """Whatever the batches are cut into, also where documents leave fewer labels in one of them."""
    ids, positions = packed_rows()
    model = build(settings={"ce_weight": 0.5})
    whole = model(ids, positions)["loss"]
    parts = [model(ids[i : i + 1], positions[i : i + 1])["loss"] for i in range(2)]
    assert abs(whole - sum(parts) / 2) < 1e-5 * whole


def test_the_teacher_is_no_part_of_the_module():
    model = build()
    before = {name: p.clone() for name, p in model.teacher.named_parameters()}
    assert [name for name, _ in model.named_children()] == ["student"]
    assert not any("teacher" in name for name in model.state_dict())
    model.train()
    assert not model.teacher.training and not any(p.requires_grad for p in model.teacher.parameters())
    model(*packed_rows())["loss"].backward()
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.teacher.named_parameters())


def test_gradient_checkpointing_changes_no_gradient():
    ids, positions = packed_rows()
    found = []
    for on in (False, True):
        model = build(torch.bfloat16)
        if on:
            model.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(ids, positions)["loss"].backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_some_steps_bring_the_student_nearer():
    ids, positions = packed_rows()
    for settings in ({}, {"lora_rank": 4, "trains": "attention"}):
        model = build(torch.bfloat16, settings=settings | {"kernel_learning_rate": 1e-2, "attention_learning_rate": 1e-2})
        optimizer = torch.optim.AdamW(
            [{key: value for key, value in group.items() if key != "name"} for group in model.parameter_groups()]
        )
        losses = []
        for _ in range(12):
            losses.append(model(ids, positions)["loss"])
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.8 * losses[0]


def test_labels_end_with_their_documents():
    ids, positions = packed_rows()
    labels = next_token_labels(ids, positions)
    assert labels[0].tolist() == [*ids[0, 1:].tolist(), -100]
    assert labels[1].tolist() == [*ids[1, 1:7].tolist(), -100, *ids[1, 8:].tolist(), -100]
    assert torch.equal(next_token_labels(ids, None)[1], torch.tensor([*ids[1, 1:].tolist(), -100]))


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match="97 vocabulary entries, the student 90"):
        build(vocab_size=90)
    for trains in ("kernel", "attention"):
        with pytest.raises(ValueError, match="leaves nothing to train"):
            build(settings={"trains": trains}, layer_types=FULL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trains": "kernel", "lora_rank": 4}, "lora_rank=4 needs trains=attention or all"),
        ({"lora_alpha": 8.0}, "lora_alpha=8.0 needs lora_rank"),
        ({"lora_rank": 2, "lora_alpha": 0.0}, "lora_alpha=0.0 must be greater than 0"),
        ({"trains": "attention", "train_embeddings": True}, "train_embeddings needs trains=all"),
        ({"kl_weight": 0.0, "ce_weight": 1.0, "teacher_top_k": 5}, "teacher_top_k=5 needs kl_weight"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_answers_are_counted_whole():
    model, (input_ids, positions) = build().eval(), packed_rows()
    model = model.requires_grad_(False)
    for measured, reads in ((model.measured, model.student), (model.teacher_measured, model.teacher)):
        ids = input_ids.clone()
        # what the first tokens predict is in the text, but for one token of the second answer
        answers = torch.zeros_like(ids)
        answers[0, 2:4], answers[0, 4:7], answers[1, 0] = 1, 2, 1
        for row, at in answers.nonzero().tolist():
            ids[row, at + 1] = reads(ids, position_ids=positions, use_cache=False).logits[row, at].argmax()
        ids[0, 6] = (ids[0, 6] + 1) % model.student.config.vocab_size
        found = measured(ids, positions, answers)
        assert found["asked"] == 3 and found["right"] == 2
        assert measured(input_ids, positions, torch.ones_like(ids))["asked"] == 2  # one in each row


def test_the_answers_weight_reaches_the_loss():
    input_ids, positions = packed_rows()
    answers = torch.zeros_like(input_ids)
    answers[0, 5:9] = 1
    softmax, settings = tiny_model(7, layer_types=FULL), config(ce_weight=0.5)
    losses = {}
    for weight in (1.0, 4.0):
        model = DistillModel(tiny_model(1), softmax, settings, answer_weight=weight).train()
        losses[weight] = model(input_ids, positions, answers=answers)
    plain = DistillModel(tiny_model(1), softmax, settings).train()(input_ids, positions)
    assert_close(losses[1.0]["loss"], plain["loss"], "loss")
    of_answers = losses[1.0]["answer_kl"] + 0.5 * losses[1.0]["answer_ce"]
    assert_close(losses[4.0]["loss"], plain["loss"] + 3 * of_answers, "loss")
    assert losses[1.0]["answer_share"] == 4 / 38 and "answer_share" not in plain


@pytest.mark.parametrize("settings", [{}, {"trains": "attention"}, {"lora_rank": 2}])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("full_heads", [[[], [1]], [[0, 1], [0]]])
def test_queries_and_keys_of_kept_heads_stay_as_they_were(settings, bias, full_heads):
    """Two steps of AdamW change every other row."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "full_heads": full_heads, "attention_bias": bias}
    input_ids, positions = packed_rows()
    for trained_too in (False, True):
        model = build(settings=settings | {"train_kept_heads": trained_too}, **heads)
        before = {name: x.clone() for name, x in merged_state(model.student).items()}
        optimizer = torch.optim.AdamW([p for g in model.parameter_groups() for p in g["params"]], lr=1e-2, weight_decay=0.0)
        for _ in range(2):
            model(input_ids, positions)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        after = merged_state(model.student)
        d, parts = model.student.config.head_dim, ("weight", "bias") if bias and not settings.get("lora_rank") else ("weight",)
        for projection, repeats in (("q_proj", 2), ("k_proj", 1)):
            for part in parts:
                for layer, kept in enumerate(full_heads):
                    frozen, name = [] if trained_too else kept, f"model.layers.{layer}.self_attn.{projection}.{part}"
                    if name not in after:  # a layer of softmax is not of those that `attention` trains
                        continue
                    same = (before[name] == after[name]).view(2, repeats * d, -1)
                    for head in (0, 1):
                        assert same[head].all() if head in frozen else not same[head].flatten(1).all(-1).any(), name
    with pytest.raises(ValueError, match=r"weight_decay=0\.1 would shrink the queries"):
        build(settings={"weight_decay": 0.1}, **heads)


def test_each_step_has_a_share_of_the_memory_that_its_number_decides():
    sizes = {"attention_window": 8, "attention_memory": 5, "memory_score": "learned"}
    model, whole = (build(settings={"least_memory": least, "batch_size": 2}, **sizes) for least in (0.25, 1.0))
    input_ids, positions = packed_rows()
    seen = set()
    for step in range(20):
        indices = torch.tensor([2 * step, 2 * step + 1])
        loss = model(input_ids, positions, indices)["loss"]
        (layer, _) = linear_layers(model.student).values()
        window, slots = layer.window, layer.slots
        seen.add((window, slots))
        assert 2 <= window <= 8 and all(1 <= count <= 5 for count in slots)
        again = build(settings={"least_memory": 0.25, "batch_size": 1}, **sizes)
        assert_close(again(input_ids, positions, torch.tensor([step]))["loss"], loss, "loss")
        if (window, slots) == (8, (5,) * len(slots)):
            assert_close(loss, whole(input_ids, positions)["loss"], "loss")
        else:
            assert (loss - whole(input_ids, positions)["loss"]).abs() > 1e-7
    assert len(seen) > 5
    found = model.eval()(input_ids, positions)["loss"]
    assert_close(found, whole.eval()(input_ids, positions)["loss"], "loss")
    assert layer.window == 8 and set(layer.slots) == {5}


def test_gradient_checkpointing_has_the_same_share_in_the_backward_pass():
    sizes = {"attention_window": 8, "attention_memory": 5, "memory_score": "learned"}
    input_ids, positions = packed_rows()
    gradients = []
    for checkpointing in (False, True):
        model = build(settings={"least_memory": 0.25}, **sizes)
        if checkpointing:
            model.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids, positions, torch.tensor([1, 2]))["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, x in gradients[0].items():
        assert_close(gradients[1][name], x, name)

"""Bytes that are declared are those that caches hold, and stand in every table."""

import pytest
import torch

from dijiang.convert import convert_model, load_source
from dijiang.evaluate import linear_only, no_memory
from dijiang.evaluate.quality.memory_use import memory_use
from dijiang.evaluate.report.model_card import model_card
from dijiang.evaluate.report.tables import memory_rows, score_table
from dijiang.modeling import DiJiangCache, DiJiangConfig, DiJiangForCausalLM

SHAPE = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 32}
LENGTHS = (40, 57)
SETTINGS = {
    "softmax": {"layer_types": ["full_attention"] * 3},
    "linear": {},
    "mixed": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "memory": {"attention_memory": 5, "memory_score": "key_norm"},
    "uneven memory": {"attention_memory": [[5, 0], [2, 2], [0, 0]], "memory_score": "random"},
    "kept": {"full_heads": [[0], [], [0, 1]]},
    "both": {"full_heads": [[0], [], [1]], "attention_memory": 4, "memory_score": "key_norm"},
    "no window": {"attention_window": 0, "attention_sinks": 0},
}
ABLATIONS = {"linear_only": linear_only, "no_memory": no_memory}


def config_of(name: str) -> DiJiangConfig:
    settings = {"attention_window": 6, "attention_sinks": 2} | SETTINGS[name]
    return DiJiangConfig(vocab_size=320, intermediate_size=16, **SHAPE, **settings)


@torch.no_grad()
def held(model, tokens: int) -> int:
    """What the cache holds after a prompt."""
    cache = DiJiangCache(model.config)
    model(torch.zeros(1, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    return cache.memory_bytes()


def built(config: DiJiangConfig, dtype=torch.float32):
    return DiJiangForCausalLM(config).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SETTINGS)
def test_declared_is_what_caches_hold(name, dtype):
    config = config_of(name)
    model = built(config, dtype)
    use = memory_use(config, LENGTHS, dtype)
    assert use["bytes_per_sequence"] == {str(length): held(model, length) for length in LENGTHS}
    short, longer = use["bytes_per_sequence"].values()
    assert longer - short == use["bytes_per_token"] * (LENGTHS[1] - LENGTHS[0])
    heads = {"softmax": 6, "mixed": 2, "kept": 3, "both": 2}.get(name, 0)
    assert use["bytes_per_token"] == heads * 2 * 8 * dtype.itemsize and use["constant"] == (heads == 0)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("name", ["linear", "memory", "both", "mixed"])
def test_an_ablation_counts_what_is_left(name, ablation):
    config = config_of(name)
    model = built(config)
    with ABLATIONS[ablation](model):
        expected = held(model, 40)
    assert memory_use(config, (40,), torch.float32, ablation)["bytes_per_sequence"]["40"] == expected


def test_parts_add_up():
    """Without attention nothing of a linear layer is left; without the linear branch all but its sums."""
    config = config_of("both")
    bytes_of = {
        key: memory_use(config, (40,), torch.float32, key)["bytes_per_sequence"]["40"]
        for key in (None, "window_only", "linear_only", "no_attention")
    }
    kept = 2 * 2 * 8 * 4 * 40
    assert bytes_of["no_attention"] == 0
    assert bytes_of[None] - bytes_of["window_only"] == bytes_of["linear_only"] - kept
    assert kept < bytes_of["window_only"] < bytes_of[None]
    mixed = memory_use(config_of("mixed"), (40,), torch.float32, "no_attention")
    assert mixed == {"bytes_per_token": 128, "bytes_per_sequence": {"40": 128 * 40}, "constant": False}


def test_sliding_layers_hold_no_more_than_their_window():
    config = DiJiangConfig(**SHAPE, layer_types=["sliding_attention"] * 3, sliding_window=16)
    use = memory_use(config, (8, 16, 400), torch.float32)
    assert use["constant"] and use["bytes_per_token"] == 0
    sizes = use["bytes_per_sequence"]
    assert sizes["8"] < sizes["16"] == sizes["400"]


@pytest.mark.usefixtures("undrawn")
def test_results_and_tables_show_it(pair, evaluated, others, tmp_path):
    settings = {"attention_window": 4, "attention_sinks": 2, "full_heads": [[1], []], "attention_memory": 3}
    student = convert_model(pair.teacher, tmp_path / "kept", progress=False, **settings, memory_score="key_norm")
    result = evaluated(checkpoint=student, beside=others, lengths=(24, 48))
    memory = result["memory"]
    assert memory["dtype"] == "float32" and list(memory["variants"]) == list(result["subjects"])
    config = load_source(student)[0].config
    assert memory["variants"]["student"] == memory_use(config, (24, 48, 4096), torch.float32)
    teacher = memory["variants"]["teacher"]
    assert teacher["bytes_per_sequence"]["4096"] == 2 * 2 * 8 * 2 * 4 * 4096 and not teacher["constant"]
    assert memory["variants"]["beside:other"] == teacher and memory["variants"]["window_sinks"]["constant"]
    growth = memory_rows(result)["bytes per token"]
    shown = dict(zip(result["subjects"], growth, strict=True))
    assert shown["teacher"] == "+256" and shown["student"] == "+64"
    assert shown["window_sinks"] == shown["beside:other-dijiang"] == "constant"
    _, rows = score_table(result)
    names = ["memory: bytes per token", *(f"memory: sequence of {length} tokens" for length in ("24", "48", "4,096"))]
    assert [row[0] for row in rows[-4:]] == names
    assert memory_rows({key: value for key, value in result.items() if key != "memory"}) == {}
    text = model_card(student, result).text
    assert "| bytes per token | memory | – | – | +256 | constant | +64 |" in text
    assert "1 key/value heads that keep every token 64 bytes for each token" in text
    assert "1 of the 4 key/value heads of these layers keep every token instead" in text
    assert "to up to 3 older ones that score highest (exact memory)" in text


@pytest.mark.usefixtures("undrawn")
def test_what_has_no_such_variant_has_no_memory(pair, evaluated, tmp_path):
    settings = {"attention_window": 0, "attention_sinks": 0}
    result = evaluated(checkpoint=convert_model(pair.teacher, tmp_path / "linear", progress=False, **settings))
    assert {"window_only", "linear_only"}.isdisjoint(result["memory"]["variants"])
    assert memory_rows(result)["bytes per token"][3:5] == ["–", "–"]


@pytest.mark.drawn
def test_the_page_shows_it(evaluated, tmp_path):
    evaluated(lengths=(24,))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<td>bytes per token<br>" in page and "+256" in page and "constant" in page


def test_replaced_settings_leave_the_config_alone():
    config = config_of("memory")
    before = config.to_dict()
    memory_use(config, (40,), torch.float32, "linear_only")
    assert config.to_dict() == before

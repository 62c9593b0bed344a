"""The `paper` preset against the released code of arXiv 2403.19928, written from its formulas in float64."""

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from dijiang_testing.model_checks import assert_close
from scipy.fft import dct
from torch import nn

from dijiang.convert import PRESETS, convert_model
from dijiang.modeling import DiJiangConfig, DiJiangForCausalLM
from dijiang.modeling.decoder_modules import DiJiangRotaryEmbedding
from dijiang.modeling.linear_attention_layer import DiJiangLinearAttention

TOLERANCE = 1e-5
HEADS = (3, 4)  # the decay tables of an odd and an even number


class ReleasedAttention(nn.Module):
    """
    One GPT-NeoX layer as released: decay tables for every position up to T, a quadratic mask, no normalizer. The fused
    projections and `dense` are the source's; u (d,) are the uniform points of T, t (d,) their quantiles; one of them is given.
    """

    def __init__(self, num_heads: int, head_dim: int, length: int, *, t=None, u=None, dtype=torch.float64):
        super().__init__()
        H, d, hidden = num_heads, head_dim, num_heads * head_dim
        self.num_heads = H
        self.query_key_value, self.dense = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.norm = nn.GroupNorm(num_groups=d, num_channels=hidden)
        self.gate = nn.Linear(hidden, hidden, bias=False)
        self.C = torch.from_numpy(dct(torch.eye(d, dtype=torch.float64).numpy(), axis=0, norm="ortho"))
        if t is None:
            t = torch.distributions.Normal(0.0, 1.0).icdf(u.double())
            t = t.masked_fill(t.isinf(), 0.0)
        self.t = nn.Parameter(t.double())
        g = 1 - torch.linspace(math.log(1 / 32), math.log(1 / 512), H, dtype=torch.float64).exp()
        n = torch.arange(length, dtype=torch.float64)
        self.D1, self.D2 = nn.Parameter(g[:, None] ** n), nn.Parameter(g[:, None] ** -n)
        self.to(dtype)

    def forward(self, hidden_states, position_embeddings, rows=slice(None), **unused):
        """Output (B, T, hidden), or of the tokens `rows` alone, and no weights."""
        x = hidden_states.to(self.D1.dtype)
        B, T, hidden = x.shape
        q, k, v = self.query_key_value(x).view(B, T, self.num_heads, -1).transpose(1, 2).chunk(3, dim=-1)
        cos, sin = (y[:, None].to(x.dtype) for y in position_embeddings)
        size = cos.shape[-1]

        def turn(y):
            half = torch.cat((-y[..., size // 2 : size], y[..., : size // 2]), dim=-1)
            return torch.cat((y[..., :size] * cos + half * sin, y[..., size:]), dim=-1)

        P = self.C.to(x.dtype) * self.t  # C diag(t)
        q = (turn(q) @ P).softmax(-1) * self.D1[:, :T, None]
        k = (turn(k) @ P).softmax(-1) * self.D2[:, :T, None]
        A = q[:, :, rows] @ k.transpose(-1, -2)
        A = A * torch.ones(T, T, dtype=x.dtype).tril()[rows]
        o = (A @ v).transpose(1, 2).reshape(-1, hidden)
        o = self.norm(o).view(B, -1, hidden) * F.silu(self.gate(x[:, rows]))
        return self.dense(o).to(hidden_states.dtype), None


def neox_like(num_heads: int, head_dim: int = 8, **overrides) -> DiJiangConfig:
    """The preset on a decoder shaped like Pythia: as many key/value heads as heads, biases, a quarter of a head rotated."""
    shape = {
        "vocab_size": 97,
        "hidden_size": num_heads * head_dim,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": num_heads,
        "mlp_type": "plain",
        "mlp_bias": True,
        "norm_type": "layer_norm",
        "parallel_residual": True,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    }
    return DiJiangConfig(**PRESETS["paper"] | shape | overrides)


def random_layer(num_heads: int, seed: int, **overrides) -> DiJiangLinearAttention:
    """A layer of the preset, its T as drawn, random values for all that a checkpoint or training fills."""
    torch.manual_seed(seed)
    layer = DiJiangLinearAttention(neox_like(num_heads, feature_seed=seed, **overrides), layer_idx=0)
    hidden = layer.o_proj.in_features
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("proj.weight"):
                parameter.normal_(std=1.5 * hidden**-0.5)
            elif name.endswith("proj.bias") or name == "output_norm.bias":
                parameter.normal_(std=0.5)
            elif name == "output_norm.weight":
                parameter.normal_(mean=1.0, std=0.5)
            elif name == "output_gate.weight":
                parameter.normal_(std=hidden**-0.5)
    return layer


def released(layer, length: int, dtype=torch.float64) -> ReleasedAttention:
    """The oracle with the weights of `layer`."""
    H, d = layer.num_heads, layer.head_dim
    oracle = ReleasedAttention(H, d, length, t=layer.feature_map_q.T[0].detach(), dtype=dtype)
    with torch.no_grad():
        for kind in ("weight", "bias"):
            parts = [getattr(getattr(layer, f"{letter}_proj"), kind) for letter in "qkv"]
            fused = torch.stack([part.unflatten(0, (H, d)) for part in parts], dim=1)
            getattr(oracle.query_key_value, kind).copy_(fused.flatten(0, 2))
            getattr(oracle.dense, kind).copy_(getattr(layer.o_proj, kind))
            getattr(oracle.norm, kind).copy_(getattr(layer.output_norm, kind))
        oracle.gate.weight.copy_(layer.output_gate.weight)
    return oracle


def inputs(layer, B: int, T: int, seed: int = 0):
    """Hidden states (B, T, hidden) and the rotary tables of positions 0 .. T - 1, float32."""
    x = torch.randn(B, T, layer.o_proj.in_features, generator=torch.Generator().manual_seed(seed))
    return x, DiJiangRotaryEmbedding(layer.config)(x, torch.arange(T)[None])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("num_heads", HEADS)
@pytest.mark.parametrize("T", [1, 50, 513, 2048])
@torch.no_grad()
def test_layer_equals_the_released_code(T, num_heads, seed):
    layer = random_layer(num_heads, seed)
    x, positions = inputs(layer, 1 if T == 2048 else 2, T, seed)
    expected, _ = released(layer, 2048)(x, positions)
    assert_close(layer(x, positions)[0], expected, "layer output", tolerance=TOLERANCE)


def gradients_of_released(oracle: ReleasedAttention, x, positions, cotangent) -> dict[str, torch.Tensor]:
    """Under our layer's names, and `input`."""
    x = x.clone().requires_grad_()
    oracle(x, positions)[0].backward(cotangent)
    gradients = {
        "input": x.grad,
        "output_norm.weight": oracle.norm.weight.grad,
        "output_norm.bias": oracle.norm.bias.grad,
        "output_gate.weight": oracle.gate.weight.grad,
    }
    for kind in ("weight", "bias"):
        gradients[f"o_proj.{kind}"] = getattr(oracle.dense, kind).grad
        fused = getattr(oracle.query_key_value, kind).grad.unflatten(0, (oracle.num_heads, 3, -1))
        for i, letter in enumerate("qkv"):
            gradients[f"{letter}_proj.{kind}"] = fused[:, i].flatten(0, 1)
    return gradients


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("num_heads", HEADS)
def test_gradients_equal_those_of_the_released_code(num_heads, seed):
    layer, T = random_layer(num_heads, seed), 70
    x, positions = inputs(layer, 2, T, seed)
    cotangent = torch.randn_like(x)
    expected = gradients_of_released(released(layer, T), x, positions, cotangent)
    # groups of a few channels may be nearly constant, and their norm then magnifies rounding in either implementation
    rounded = gradients_of_released(released(layer, T, dtype=torch.float32), x, positions, cotangent)
    rounding = max((rounded[name].double() - g.double()).abs().max() / g.abs().max() for name, g in expected.items())
    assert rounding < 5e-5
    ours = x.clone().requires_grad_()
    layer(ours, positions)[0].backward(cotangent)
    for name, gradient in expected.items():
        layer_gradient = ours.grad if name == "input" else layer.get_parameter(name).grad
        assert_close(layer_gradient, gradient, name, tolerance=TOLERANCE + 2 * rounding)
    # the released features are not trained
    assert all(p.grad is None for part in (layer.feature_map_q, layer.feature_map_k) for p in part.parameters())


@torch.no_grad()
def test_features_are_the_softmax_of_x_P():
    """P[r, c] = C[r, c] t_c: the inverse transform of x, each of its outputs scaled."""
    layer = random_layer(3, seed=4)
    P = torch.from_numpy(dct(torch.eye(8).double().numpy(), axis=0, norm="ortho")) * layer.feature_map_q.T[0].double()
    x = torch.randn(2, 9, 3, 8)
    for part in (layer.feature_map_q, layer.feature_map_k):
        assert_close(part(x), (x.double() @ P).softmax(-1), "features", tolerance=1e-6)
    forward = random_layer(3, seed=4, dct_direction="forward").feature_map_q
    assert (forward(x) - layer.feature_map_q(x)).abs().max() > 0.05  # the two directions differ


def test_initial_T_are_normal_quantiles_of_uniforms_one_matrix_for_all_heads():
    points = []
    for seed in range(8):
        layer = DiJiangLinearAttention(neox_like(3, head_dim=64, feature_seed=seed), layer_idx=0)
        t = layer.feature_map_q.T
        for part in (layer.feature_map_q, layer.feature_map_k):
            assert torch.equal(part.T, t[:1].expand(3, -1)) and not part.log_D.any()
        assert torch.isfinite(t).all()
        points.append(torch.special.ndtr(t[0].detach().double()))
        assert_close(ReleasedAttention(3, 64, 1, u=points[-1]).t, t[0], "quantiles", tolerance=TOLERANCE)
    assert len({tuple(x.tolist()) for x in points}) == 8
    joined = torch.cat(points).sort().values
    distance = (joined - (torch.arange(512, dtype=torch.float64) + 0.5) / 512).abs().max()
    assert distance < 1.63 * 512**-0.5  # Kolmogorov-Smirnov at 1 %


def test_gate_and_norm_start_as_in_the_released_code():
    """The gate: Xavier's uniform law with gain 2^-2.5, no bias. GroupNorm: ones and zeros, d groups, eps 1e-5."""
    torch.manual_seed(7)
    layer = DiJiangLinearAttention(neox_like(4, head_dim=32), layer_idx=0)
    assert layer.output_gate.weight.shape == (128, 128) and layer.output_gate.bias is None
    bound = 2**-2.5 * math.sqrt(6 / 256)
    weight = layer.output_gate.weight.detach()
    assert 0.999 * bound < weight.abs().max() <= bound
    assert abs(weight.std() / (bound / math.sqrt(3)) - 1) < 0.02 and abs(weight.mean()) < 0.02 * bound
    torch.manual_seed(7)
    own = torch.empty_like(weight)
    layer.output_gate.reset_parameters()
    torch.manual_seed(7)
    nn.init.xavier_uniform_(own, gain=2**-2.5)
    assert torch.equal(layer.output_gate.weight, own)
    norm = layer.output_norm
    assert (norm.num_groups, norm.num_channels, norm.eps) == (32, 128, 1e-5)
    assert torch.equal(norm.weight, torch.ones(128)) and not norm.bias.any()
    parts = {name for name, module in layer.named_children() if "_proj" not in name and module is not None}
    assert parts == {"feature_map_q", "feature_map_k", "decay", "output_norm", "output_gate"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [8192, 32768])
@torch.no_grad()
def test_finite_where_the_released_tables_overflow(T, dtype):
    layer = random_layer(2, seed=5, head_dim=4).to(dtype)
    x, positions = inputs(layer, 1, T)
    o, _ = layer(x.to(dtype), tuple(y.to(dtype) for y in positions))
    assert torch.isfinite(o).all()
    table = released(layer, T).D2[0].to(torch.float16 if dtype == torch.float16 else torch.float32)
    assert torch.isinf(table[-1])
    if T == 8192:  # where float64 still holds the tables
        expected, _ = released(layer, T)(x.to(dtype).float(), positions, rows=slice(-64, None))
        tolerance = TOLERANCE if dtype == torch.float32 else 0.1
        assert_close(o[:, -64:], expected, "last tokens", tolerance=tolerance)


@torch.no_grad()
def test_released_tables_end_where_its_users_met_NaN():
    layer = random_layer(2, seed=6, head_dim=4)
    tables = released(layer, 3000).D2[0]  # of the head that forgets fastest
    firsts = [int(tables.to(dtype).isinf().nonzero()[0]) for dtype in (torch.float16, torch.float32)]
    assert 340 <= firsts[0] <= 360 and 2750 <= firsts[1] <= 2850
    x, positions = inputs(layer, 1, 3000)
    original, _ = released(layer, 3000, dtype=torch.float32)(x, positions)
    assert original[:, -1].isnan().all() and torch.isfinite(layer(x, positions)[0]).all()


@pytest.mark.parametrize("num_heads", HEADS)
def test_converted_model_equals_the_released_model(make_source, tokens, tmp_path, num_heads):
    """Conversion, logits and cached decoding, against the transformers model with its attention replaced by the formulas."""
    hidden, layers = num_heads * 8, 2
    folder, source = make_source("gpt_neox", num_attention_heads=num_heads, hidden_size=hidden, rotary_pct=0.25)
    convert_model(folder, tmp_path / "out", preset="paper", progress=False)
    model = DiJiangForCausalLM.from_pretrained(tmp_path / "out")
    replaced, gates = deepcopy(source).double(), []
    for layer, ours in zip(replaced.gpt_neox.layers, model.model.layers, strict=True):
        attention = ours.self_attn
        oracle = ReleasedAttention(num_heads, 8, 128, t=attention.feature_map_k.T[-1].detach())
        oracle.query_key_value, oracle.dense = layer.attention.query_key_value, layer.attention.dense
        with torch.no_grad():
            oracle.gate.weight.copy_(attention.output_gate.weight)
        gates.append(attention.output_gate.weight)
        layer.attention = oracle
    # fresh modules: the released layer's own start, another draw in every layer
    assert all(gate.abs().max() <= 2**-2.5 * math.sqrt(3 / hidden) for gate in gates) and not torch.equal(*gates)
    radii = [layer.self_attn.feature_map_q.T[0] for layer in model.model.layers]
    assert len(radii) == layers and not torch.equal(*radii)

    ids = tokens(90)
    with torch.no_grad():
        expected = replaced(ids, use_cache=False).logits
        assert_close(model(ids, use_cache=False).logits, expected, "logits", tolerance=TOLERANCE)
        assert (expected - source(ids).logits).abs().max() > 0.1  # another attention than the source's
        cache, steps = None, []
        for piece in (ids[:, :37], *ids[:, 37:].split(1, dim=1)):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    assert_close(torch.cat(steps, dim=1), expected, "cached logits", tolerance=TOLERANCE)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    generated = model.generate(ids[:, :30], **options)
    with torch.no_grad():  # greedy choices of the oracle at every step of that text
        choices = replaced(generated, use_cache=False).logits.argmax(-1)
    assert torch.equal(generated[:, 30:], choices[:, 29:-1])

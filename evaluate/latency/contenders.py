"""
Contenders of the latency benchmark: a model with one kind of cache that reads prompts, decodes one token of every sequence and
takes it back, with the bytes of its cache and the least that a decoding step computes and moves.

B batch, T tokens of context, H heads, G key/value heads, d head size, M features.
"""

from copy import deepcopy

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from dijiang.modeling import FEATURE_MAPS, DiJiangCache, DiJiangForCausalLM
from dijiang.modeling.linear_attention_layer import DiJiangLinearAttention, linear_layers
from dijiang.modeling.transformers_compat import CACHE_NAME

from .models import LatencyPair

FILLED = "before decoding it is filled with random keys and values, on which no time depends; a step's token is cut off again"
WORDS = {
    "softmax": "the softmax model in transformers' own class, with its default attention and its default cache "
    f"(DynamicCache), which copies all keys and values at every step; {FILLED}",
    "softmax static": f"the same with StaticCache, of just the size needed, which is written in place; {FILLED}",
    "dijiang": "the DiJiang model with its own cache; before decoding it has read all of the context, with a batch of one, "
    "whose state is then repeated; decoding goes on from step to step",
}


class Contender:
    """A model with one kind of cache; subclasses build the cache and count its bytes."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.device = model.device
        self.dtype = model.dtype

    def new_cache(self, tokens: int) -> Cache:
        """An empty cache with room for `tokens` tokens."""
        raise NotImplementedError

    def filled_cache(self, batch: int, context: int) -> Cache:
        """The cache of `batch` sequences after `context` tokens, with room for one more."""
        raise NotImplementedError

    def step_back(self, cache: Cache) -> None:
        """Remove the last token from a cache that grows with every token."""
        raise NotImplementedError

    def cache_bytes(self, batch: int, context: int) -> int:
        """Bytes of `filled_cache`."""
        raise NotImplementedError

    def mixing(self, batch: int, context: int) -> tuple[int, int]:
        """FLOPs, and bytes moved of the cache, of one decoding step between the projections of all layers."""
        raise NotImplementedError

    def random_ids(self, batch: int, tokens: int) -> torch.Tensor:
        return torch.randint(0, self.model.config.vocab_size, (batch, tokens), device=self.device)

    @torch.no_grad()
    def prefill(self, ids: torch.Tensor) -> tuple[list[int], Cache]:
        """The tokens that follow ids (B, T), copied to the host, and the cache."""
        cache = self.new_cache(ids.shape[1] + 1)
        logits = self.model(input_ids=ids, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1).tolist(), cache

    @torch.no_grad()
    def step(self, ids: torch.Tensor, cache: Cache) -> list[int]:
        """The tokens that follow ids (B, 1), copied to the host."""
        return self.model(input_ids=ids, **{CACHE_NAME: cache}, use_cache=True).logits[:, -1].argmax(-1).tolist()

    @property
    def weights_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def least_work(self, batch: int, context: int) -> tuple[int, int]:
        """
        Least FLOPs and bytes of one decoding step: each matrix multiplies every sequence and is read once, and `mixing` is
        added. Only single rows are read of an embedding that is not tied to the head.
        """
        matrices = sum(module.weight.numel() for module in self.model.modules() if isinstance(module, nn.Linear))
        embedding = self.model.get_input_embeddings().weight
        tied = embedding is self.model.get_output_embeddings().weight
        flops, moved = self.mixing(batch, context)
        read = self.weights_bytes - (0 if tied else embedding.nbytes)
        return 2 * batch * matrices + flops, read + moved


class SoftmaxContender(Contender):
    """The softmax model in transformers' own class, with a cache that grows or with a `static` one."""

    def __init__(self, model: PreTrainedModel, *, static: bool):
        super().__init__(model)
        self.static = static
        config = model.config
        self.layers = config.num_hidden_layers
        self.heads = config.num_attention_heads
        self.groups = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads

    def new_cache(self, tokens: int) -> Cache:
        config = self.model.config
        return StaticCache(config=config, max_cache_len=tokens) if self.static else DynamicCache(config=config)

    @torch.no_grad()
    def filled_cache(self, batch: int, context: int) -> Cache:
        cache = self.new_cache(context + 1)
        shape = (batch, self.groups, context, self.head_dim)
        for layer in range(self.layers):
            cache.update(*(torch.randn(shape, dtype=self.dtype, device=self.device) for _ in "kv"), layer)
        return cache

    def step_back(self, cache: Cache) -> None:
        if self.static:
            for layer in cache.layers:
                layer.cumulative_length.sub_(1)
        else:
            cache.crop(-1)

    def bytes_of(self, batch: int, tokens: int) -> int:
        return 2 * batch * tokens * self.layers * self.groups * self.head_dim * self.dtype.itemsize

    def cache_bytes(self, batch: int, context: int) -> int:
        return self.bytes_of(batch, context + self.static)

    def mixing(self, batch: int, context: int) -> tuple[int, int]:
        flops = 4 * batch * self.layers * self.heads * self.head_dim * (context + 1)
        read = self.bytes_of(batch, context + 1)
        copied = 0 if self.static else self.bytes_of(batch, context) + self.bytes_of(batch, context + 1)
        return flops, read + copied


class DiJiangContender(Contender):
    """The DiJiang model; softmax layers that it kept count like those of a growing cache."""

    def __init__(self, model: DiJiangForCausalLM):
        super().__init__(model)
        self.prefix: tuple[int, Cache | None] = (0, None)  # number of tokens, and the cache of one sequence of them

    def new_cache(self, tokens: int) -> Cache:
        return DiJiangCache(self.model.config)

    def filled_cache(self, batch: int, context: int) -> Cache:
        if self.prefix[0] != context:
            self.prefix = (context, self.prefill(self.random_ids(1, context))[1])
        cache = deepcopy(self.prefix[1])
        cache.batch_repeat_interleave(batch)
        return cache

    def step_back(self, cache: Cache) -> None:
        for layer in cache.layers:
            if type(layer) is DynamicLayer:
                layer.crop(-1)

    def cache_bytes(self, batch: int, context: int) -> int:
        linear = sum(sums_bytes(x) + window_bytes(x, self.dtype) + bookkeeping_bytes(x) for x in self.linear)
        return batch * (linear + self.softmax_tokens(context) * self.token_bytes)

    def mixing(self, batch: int, context: int) -> tuple[int, int]:
        config = self.model.config
        before = self.softmax_tokens(context)
        after = self.softmax_tokens(context + 1)
        flops = sum(linear_step_flops(x) for x in self.linear) + 4 * config.num_attention_heads * config.head_dim * after
        # sums are read and written; the window is read
        moved = sum(2 * sums_bytes(x) + window_bytes(x, self.dtype) for x in self.linear)
        return batch * flops, batch * (moved + (before + 2 * after) * self.token_bytes)

    @property
    def linear(self) -> list[DiJiangLinearAttention]:
        return list(linear_layers(self.model).values())

    @property
    def token_bytes(self) -> int:
        """Bytes of one key and value of one softmax layer."""
        return 2 * self.model.config.num_key_value_heads * self.model.config.head_dim * self.dtype.itemsize

    def softmax_tokens(self, tokens: int) -> int:
        """Keys of one sequence, summed over the softmax layers; sliding ones hold one token less than their window."""
        config = self.model.config
        sliding = min(tokens, (config.sliding_window or 1) - 1)
        return sum({"full_attention": tokens, "sliding_attention": sliding}.get(kind, 0) for kind in config.layer_types)


def sums_bytes(layer: DiJiangLinearAttention) -> int:
    """Bytes of one sequence's sum of phi(k) (v, 1), which is float32."""
    return 4 * layer.num_key_value_heads * layer.feature_map_k.size * (layer.head_dim + layer.sums)


def window_bytes(layer: DiJiangLinearAttention, dtype: torch.dtype) -> int:
    """Bytes of one sequence's keys and values in window and sinks."""
    return 2 * (layer.window + layer.sinks) * layer.num_key_value_heads * layer.head_dim * dtype.itemsize


def bookkeeping_bytes(layer: DiJiangLinearAttention) -> int:
    """Bytes of one sequence's number of tokens, positions in the window, and flags of filled sinks."""
    return 8 + 8 * layer.window + layer.sinks


def linear_step_flops(layer: DiJiangLinearAttention) -> int:
    """
    FLOPs of one decoded token between the projections: features of its query and of the key that leaves the window, update
    and reading of the sums, softmax over the window.
    """
    H, G = layer.num_heads, layer.num_key_value_heads
    d, M = layer.head_dim, layer.feature_map_k.size
    projected = "feature_dim" in FEATURE_MAPS[layer.config.feature_map].settings
    features = 2 * (H + G) * layer.feature_map_k.feature_dim * d if projected else 0
    return features + 2 * (H + G) * M * (d + layer.sums) + 4 * H * d * (layer.window + layer.sinks)


def contenders_of(pair: LatencyPair) -> dict[str, Contender]:
    """The contenders by their names in results."""
    return {
        "softmax": SoftmaxContender(pair.softmax, static=False),
        "softmax static": SoftmaxContender(pair.softmax, static=True),
        "dijiang": DiJiangContender(pair.dijiang),
    }

"""
The contenders of the latency benchmark: each reads a prompt, decodes a token of every sequence and takes it back, and knows
how many bytes its cache has and what a decoding step must at least compute and move.

B batch, T tokens of context, H heads, G key/value heads, d head size, M features, W window, S sinks.
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
    """A model with one kind of cache, which subclasses make, and whose bytes they know."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.device, self.dtype = model, model.device, model.dtype

    def new_cache(self, tokens: int) -> Cache:
        """An empty cache with room for so many tokens."""
        raise NotImplementedError

    def filled_cache(self, batch: int, context: int) -> Cache:
        """The cache of `batch` sequences after `context` tokens, with room for one more."""
        raise NotImplementedError

    def step_back(self, cache: Cache) -> None:
        """Take the last token out again where the cache grows by it."""
        raise NotImplementedError

    def cache_bytes(self, batch: int, context: int) -> int:
        """Of `filled_cache`."""
        raise NotImplementedError

    def mixing(self, batch: int, context: int) -> tuple[int, int]:
        """FLOPs and bytes of the cache that one decoding step takes between the projections, all layers."""
        raise NotImplementedError

    def random_ids(self, batch: int, tokens: int) -> torch.Tensor:
        return torch.randint(0, self.model.config.vocab_size, (batch, tokens), device=self.device)

    @torch.no_grad()
    def prefill(self, ids: torch.Tensor) -> tuple[list[int], Cache]:
        """The tokens that follow ids (B, T), known to the host, and the cache."""
        cache = self.new_cache(ids.shape[1] + 1)
        logits = self.model(input_ids=ids, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1).tolist(), cache

    @torch.no_grad()
    def step(self, ids: torch.Tensor, cache: Cache) -> list[int]:
        """The tokens that follow ids (B, 1), known to the host."""
        return self.model(input_ids=ids, **{CACHE_NAME: cache}, use_cache=True).logits[:, -1].argmax(-1).tolist()

    @property
    def weights_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def least_work(self, batch: int, context: int) -> tuple[int, int]:
        """
        FLOPs and bytes of one decoding step: each matrix multiplies every sequence and is read once, the cache as `mixing`
        says. Of an embedding that is not the head too, only single rows are read.
        """
        matrices = sum(module.weight.numel() for module in self.model.modules() if isinstance(module, nn.Linear))
        embedding, head = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        flops, moved = self.mixing(batch, context)
        read = self.weights_bytes - (0 if embedding is head else embedding.nbytes)
        return 2 * batch * matrices + flops, read + moved


class SoftmaxContender(Contender):
    """transformers' own class of the softmax model, with a cache that grows or a `static` one."""

    def __init__(self, model: PreTrainedModel, *, static: bool):
        super().__init__(model)
        self.static = static
        config = model.config
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
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
    """The DiJiang model; its softmax layers, if it kept some, count as those of a growing cache."""

    def __init__(self, model: DiJiangForCausalLM):
        super().__init__(model)
        self.read: tuple[int, Cache | None] = (0, None)  # one sequence of so many tokens

    def new_cache(self, tokens: int) -> Cache:
        return DiJiangCache(self.model.config)

    def filled_cache(self, batch: int, context: int) -> Cache:
        if self.read[0] != context:
            self.read = context, self.prefill(self.random_ids(1, context))[1]
        cache = deepcopy(self.read[1])
        cache.batch_repeat_interleave(batch)
        return cache

    def step_back(self, cache: Cache) -> None:
        for layer in cache.layers:
            if type(layer) is DynamicLayer:
                layer.crop(-1)

    def cache_bytes(self, batch: int, context: int) -> int:
        linear = sum(sums_bytes(x) + near_bytes(x, self.dtype) + bookkeeping_bytes(x) for x in self.linear)
        return batch * (linear + self.softmax_tokens(context) * self.token_bytes)

    def mixing(self, batch: int, context: int) -> tuple[int, int]:
        config, before, after = self.model.config, self.softmax_tokens(context), self.softmax_tokens(context + 1)
        flops = sum(mixing_flops(x) for x in self.linear) + 4 * config.num_attention_heads * config.head_dim * after
        # the sums are read and written, of the window one token is written
        moved = sum(2 * sums_bytes(x) + near_bytes(x, self.dtype) for x in self.linear)
        return batch * flops, batch * (moved + (before + 2 * after) * self.token_bytes)

    @property
    def linear(self) -> list[DiJiangLinearAttention]:
        return list(linear_layers(self.model).values())

    @property
    def token_bytes(self) -> int:
        """Of one key and value of one softmax layer."""
        return 2 * self.model.config.num_key_value_heads * self.model.config.head_dim * self.dtype.itemsize

    def softmax_tokens(self, tokens: int) -> int:
        """Keys of one sequence, summed over the layers that kept softmax attention; sliding ones hold a token less."""
        config = self.model.config
        near = min(tokens, (config.sliding_window or 1) - 1)
        return sum({"full_attention": tokens, "sliding_attention": near}.get(kind, 0) for kind in config.layer_types)


def sums_bytes(layer: DiJiangLinearAttention) -> int:
    """Of one sequence's sum of phi(k) (v, 1), float32."""
    return 4 * layer.num_key_value_heads * layer.feature_map_k.size * (layer.head_dim + layer.normalize)


def near_bytes(layer: DiJiangLinearAttention, dtype: torch.dtype) -> int:
    """Of one sequence's keys and values in window and sinks."""
    return 2 * (layer.window + layer.sinks) * layer.num_key_value_heads * layer.head_dim * dtype.itemsize


def bookkeeping_bytes(layer: DiJiangLinearAttention) -> int:
    """Of one sequence: the number of tokens, where each of the window came, whether each sink is filled."""
    return 8 + 8 * layer.window + layer.sinks


def mixing_flops(layer: DiJiangLinearAttention) -> int:
    """Of one token: the features of its query and of the key that leaves the window, the sums' update and reading, softmax."""
    H, G, d, M = layer.num_heads, layer.num_key_value_heads, layer.head_dim, layer.feature_map_k.size
    projected = "feature_dim" in FEATURE_MAPS[layer.config.feature_map].settings
    features = 2 * (H + G) * layer.feature_map_k.feature_dim * d if projected else 0
    return features + 2 * (H + G) * M * (d + layer.normalize) + 4 * H * d * (layer.window + layer.sinks)


def contenders(pair: LatencyPair) -> dict[str, Contender]:
    """By their names in results."""
    return {
        "softmax": SoftmaxContender(pair.softmax, static=False),
        "softmax static": SoftmaxContender(pair.softmax, static=True),
        "dijiang": DiJiangContender(pair.dijiang),
    }

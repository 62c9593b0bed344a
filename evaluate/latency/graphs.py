"""
Decoding as CUDA graphs: a step that reads and writes the same tensors every time, so that it can be captured once and
replayed, without the kernel launches that dominate the time of a small step.

B batch.
"""

from collections.abc import Callable

import torch
from transformers.cache_utils import Cache

from dijiang.modeling.cache_dijiang import LinearStateLayer
from dijiang.modeling.transformers_compat import CACHE_NAME

from .contenders import Contender

PIECE = 32  # tokens of a prompt read at a time: short pieces need no separate kernel for the window
WARMUP = 3  # calls before a capture, in which libraries choose their kernels and allocate memory


@torch.no_grad()
def short_cache(contender: Contender, batch: int, tokens: int) -> Cache:
    """
    The cache of a contender after `tokens` random ones, read piece by piece with a batch of one and then repeated. Only for
    models all of whose layers are linear: their states have one size, and their steps one duration, after any number of
    tokens.
    """
    cache = contender.new_cache(tokens + 1)
    for ids in contender.random_ids(1, tokens).split(PIECE, dim=1):
        contender.model(input_ids=ids, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(batch)
    return cache


class InPlaceStep:
    """
    One decoding step that reads and writes the same tensors. A call replaces the tokens in `ids` by those that follow; linear
    states continue from call to call, a static cache takes its token back.

    Args:
        cache: of the contender, after `context` tokens.
        forward: in place of the model's own.

    Attributes:
        ids: (B, 1), the tokens to read.
        position: (1, 1), their position.
    """

    def __init__(self, contender: Contender, cache: Cache, ids: torch.Tensor, context: int, forward: Callable | None = None):
        self.contender = contender
        self.cache = cache
        self.ids = ids.clone()
        self.forward = forward or contender.model
        self.position = torch.full((1, 1), context, dtype=torch.long, device=ids.device)
        self.linear = [layer for layer in cache.layers if isinstance(layer, LinearStateLayer)]
        self.states = [layer.state for layer in self.linear]
        self.seen = [layer.seen for layer in self.linear]

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """Decode, and return `ids` with the tokens that follow, (B, 1)."""
        cache = {CACHE_NAME: self.cache}
        logits = self.forward(input_ids=self.ids, position_ids=self.position, **cache, use_cache=True).logits
        self.ids.copy_(logits[:, -1:].argmax(-1))
        for layer, state, seen in zip(self.linear, self.states, self.seen, strict=True):
            for tensor, value in zip(state.tensors(), layer.state.tensors(), strict=True):
                if tensor is not value:
                    tensor.copy_(value)
            layer.state = state
            layer.seen = seen  # constant, because a compiler would specialize the program on the count
        if self.linear:
            self.position.add_(1)
        self.contender.step_back(self.cache)
        return self.ids

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that a call changes, except keys and values of a static cache."""
        return [self.ids, self.position, *(tensor for state in self.states for tensor in state.tensors())]


def capture(call: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A CUDA graph of `call`, which must not wait for the device, and the tensor that every replay writes its result to."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def graphed_step(step: InPlaceStep) -> Callable[[], list[int]]:
    """
    Capture `step` as a CUDA graph. A call of the returned function replays it and returns the tokens that follow, copied to
    the host. On a CPU, which has no graphs, it runs the step.
    """
    graph, ids = capture(step, step.ids.device) if step.ids.is_cuda else (None, step.ids)

    def replay() -> list[int]:
        step() if graph is None else graph.replay()
        return ids.flatten().tolist()

    return replay


def agreement(step: InPlaceStep, replay: Callable[[], list[int]]) -> float:
    """Share of sequences for which a graph and its step give the same token; the step's tensors are restored."""
    saved = [(tensor, tensor.clone()) for tensor in step.tensors()]
    tokens = []
    for call in (replay, lambda: step().flatten().tolist()):
        tokens.append(call())
        for tensor, value in saved:
            tensor.copy_(value)
    return sum(a == b for a, b in zip(*tokens, strict=True)) / len(tokens[0])

"""
Decoding as CUDA graphs: a step of a model and its cache that reads and writes the same tensors every time, so that it can be
captured once and replayed, without the launches that a small step otherwise waits for.

B batch.
"""

from collections.abc import Callable

import torch
from transformers.cache_utils import Cache

from dijiang.modeling.cache_dijiang import LinearStateLayer

from .contenders import Contender

PIECE = 32  # tokens of a prompt read at once: so few need no kernel of their own for the window
WARMUP = 3  # calls before a capture: libraries choose their kernels and allocate then


@torch.no_grad()
def short_cache(contender: Contender, batch: int, tokens: int) -> Cache:
    """
    The cache of a contender after `tokens` random ones, read with a batch of one, piece by piece, and then repeated. For
    linear layers alone, whose states are as large, and whose steps take as long, after any number of tokens.
    """
    cache = contender.new_cache(tokens + 1)
    for ids in contender.random_ids(1, tokens).split(PIECE, dim=1):
        contender.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_repeat_interleave(batch)
    return cache


class InPlaceStep:
    """
    One decoding step from and into the same tensors. A call reads `ids`, and leaves there the tokens that follow; linear
    states go on from call to call, a static cache takes its token back.

    Attributes:
        ids: (B, 1), the tokens that go in.
        position: (1, 1), where they stand.
    """

    def __init__(self, contender: Contender, cache: Cache, ids: torch.Tensor, context: int, forward: Callable | None = None):
        self.contender, self.cache, self.ids = contender, cache, ids.clone()
        self.forward = forward or contender.model
        self.position = torch.full((1, 1), context, dtype=torch.long, device=ids.device)
        self.linear = [layer for layer in cache.layers if isinstance(layer, LinearStateLayer)]
        self.states = [layer.state for layer in self.linear]
        self.seen = [layer.seen for layer in self.linear]

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """The tokens that follow, (B, 1), in `ids`."""
        logits = self.forward(
            input_ids=self.ids, position_ids=self.position, past_key_values=self.cache, use_cache=True
        ).logits
        self.ids.copy_(logits[:, -1:].argmax(-1))
        for layer, state, seen in zip(self.linear, self.states, self.seen, strict=True):
            for kept, new in zip(state.tensors(), layer.state.tensors(), strict=True):
                if kept is not new:
                    kept.copy_(new)
            layer.state, layer.seen = state, seen  # a constant count, lest a compiler takes it for another program
        if self.linear:
            self.position.add_(1)
        self.contender.step_back(self.cache)
        return self.ids

    def tensors(self) -> list[torch.Tensor]:
        """What a call changes, but for the keys and values of a static cache."""
        return [self.ids, self.position, *(tensor for state in self.states for tensor in state.tensors())]


def capture(call: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A CUDA graph of `call`, which must not wait for the device, and the tensor into which every replay writes its result."""
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
    `step` as a CUDA graph: a call replays it and gives the tokens that follow, known to the host. On a CPU, which has no
    graphs, a call does the step.
    """
    graph, ids = capture(step, step.ids.device) if step.ids.is_cuda else (None, step.ids)

    def replay() -> list[int]:
        step() if graph is None else graph.replay()
        return ids.flatten().tolist()

    return replay


def agreement(step: InPlaceStep, replay: Callable[[], list[int]]) -> float:
    """Share of sequences for which a graph gives the token that its step gives; the step's tensors are left as they were."""
    saved = [(tensor, tensor.clone()) for tensor in step.tensors()]
    found = []
    for call in (replay, lambda: step().flatten().tolist()):
        found.append(call())
        for tensor, value in saved:
            tensor.copy_(value)
    return sum(a == b for a, b in zip(*found, strict=True)) / len(found[0])

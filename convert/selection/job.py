"""What every selection method is given: the model, the samples, and the losses whose gradients rank heads."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dijiang.common.progress import progress_bar

from .gates import candidates, count_heads, head_gates
from .selection import Head


class Sample(Protocol):
    """A context and its answers, such as `dijiang.common.recall.RecallSample`."""

    @property
    def input_ids(self) -> Tensor:
        """(T,) int64, the answers included."""

    @property
    def answers(self) -> list[tuple[int, int]]:
        """(start, end) of each answer in input_ids, start >= 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionJob:
    """
    A model and what heads are chosen by.

    Attributes:
        model: a DiJiang model with the teacher's weights, frozen, in eval mode; its linear layers keep no heads yet.
        samples: to select by.
        held_aside: to measure recall with after each step; none: it is not measured.
        text: (blocks, T) token ids of plain text, for the methods that need it.
        heads: the number of heads that will be kept.
        seed: of what is drawn.
        progress: whether to show a bar.
    """

    model: nn.Module
    samples: Sequence[Sample] = ()
    held_aside: Sequence[Sample] = ()
    text: Tensor | None = None
    heads: int
    seed: int = 0
    progress: bool = True

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def candidates(self) -> list[Head]:
        """(layer, head) of every key/value head of the linear layers."""
        return candidates(self.model)

    def gates(self, value: float = 0.0, kept: Sequence[Head] = ()) -> Tensor:
        """Gates (layers, G) of this value, and 1 for the heads that are kept."""
        gates = torch.full(count_heads(self.model), value, device=self.device)
        for layer, head in kept:
            gates[layer, head] = 1.0
        return gates

    def bar(self, method: str, total: int) -> AbstractContextManager[Callable[..., None]]:
        """A progress bar for `total` passes."""
        return progress_bar(f"select heads: {method}", total, shown=self.progress, unit="items")

    def needed_samples(self, method: str) -> Sequence[Sample]:
        """The samples, or ValueError if there are none."""
        if not self.samples:
            raise ValueError(f"{method} selects heads by samples of recall, and there are none; give some")
        return self.samples

    def needed_text(self, method: str) -> Tensor:
        """The text, or ValueError if there is none."""
        if self.text is None:
            raise ValueError(f"{method} selects heads by a text, and there is none; give one")
        return self.text


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Keep a model in eval mode, its weights without gradients, for the length of a `with` block."""
    training, trained = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in trained:
            parameter.requires_grad_(True)


def answer_positions(sample: Sample) -> Tensor:
    """Indices of the answers' tokens, (n,)."""
    return torch.cat([torch.arange(start, end) for start, end in sample.answers])


def logits_before(model: nn.Module, input_ids: Tensor, positions: Tensor) -> Tensor:
    """Logits (n, vocabulary), float32, by which a model predicts the tokens at `positions` (n,) of input_ids (T,)."""
    device = next(model.parameters()).device
    output: Any = model(input_ids=input_ids[None].to(device), use_cache=False, logits_to_keep=(positions - 1).to(device))
    return output.logits[0].float()


def answer_loss(model: nn.Module, sample: Sample) -> tuple[Tensor, list[bool]]:
    """The mean cross-entropy of a sample's answer tokens, and which answers greedy decoding would write."""
    positions = answer_positions(sample)
    logits = logits_before(model, sample.input_ids, positions)
    targets = sample.input_ids[positions].to(logits.device)
    return F.cross_entropy(logits, targets), right_answers(sample, logits)


def right_answers(sample: Sample, logits: Tensor) -> list[bool]:
    """Which answers greedy decoding would write, by the logits (n, vocabulary) before all of their tokens."""
    targets = sample.input_ids[answer_positions(sample)].to(logits.device)
    parts = (logits.argmax(-1) == targets).split([end - start for start, end in sample.answers])
    return [bool(part.all()) for part in parts]


def text_loss(model: nn.Module, block: Tensor) -> tuple[Tensor, list[bool]]:
    """The mean cross-entropy of the tokens of a block (T,) after the first, and no answers."""
    logits = logits_before(model, block, torch.arange(1, len(block)))
    return F.cross_entropy(logits, block[1:].to(logits.device)), []


@torch.no_grad()
def recall(model: nn.Module, gates: Tensor, samples: Iterable[Sample]) -> float:
    """Share of the samples' answers that greedy decoding would write, with these gates (layers, G)."""
    with head_gates(model, gates.detach()):
        right = [answer for sample in samples for answer in answer_loss(model, sample)[1]]
    return sum(right) / len(right)


def gate_gradient(
    model: nn.Module, gates: Tensor, losses: Sequence[Callable[[], tuple[Tensor, list[bool]]]], advance: Callable[[int], None]
) -> tuple[Tensor, float, float | None]:
    """
    The gradient of the mean of losses with respect to gates.

    Args:
        model: the model, frozen.
        gates: (layers, G).
        losses: functions that give a loss, and which answers were right.
        advance: called with 1 after each of them.

    Returns:
        The gradient (layers, G), the mean loss, and the share of right answers, None if none were asked for.
    """
    gates = gates.detach().clone().requires_grad_(True)
    total, right = 0.0, []
    with head_gates(model, gates), torch.enable_grad():
        for loss_of in losses:
            loss, answers = loss_of()
            (loss / len(losses)).backward()
            total += loss.item() / len(losses)
            right += answers
            advance(1)
    assert gates.grad is not None
    return gates.grad, total, sum(right) / len(right) if right else None

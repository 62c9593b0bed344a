"""The distil stage through torch.compile: on a GPU it turns the many small passes of a layer and of the loss into few."""

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch
from torch import nn

from dijiang.modeling import DiJiangForCausalLM
from dijiang.modeling.linear_attention import prefer_backend

from ..recipe.schema import Recipe
from .distillation_loss import dense_rows

BACKEND = "inductor"  # of torch.compile


class CompiledParts:
    """
    The compiled forms of a recovery model's parts. Compilation happens at the first call, once for each shape of the inputs:
    layers of one kind share their code, so a model compiles in the time of one layer.

    Attributes:
        rows: `dense_rows` of the loss.
    """

    def __init__(self, student: DiJiangForCausalLM, teacher: DiJiangForCausalLM | None):
        self.layers = {
            model: [(layer, torch.compile(layer.forward, dynamic=False, backend=BACKEND)) for layer in model.model.layers]
            for model in (student, teacher)
            if model is not None
        }
        self.rows: Callable = torch.compile(dense_rows, dynamic=False, backend=BACKEND)

    @contextlib.contextmanager
    def inside(self, model: DiJiangForCausalLM) -> Iterator[None]:
        """Within the block the layers of `model`, the student or the teacher, run compiled, each as one piece of code."""
        for layer, call in self.layers[model]:
            layer.forward = call
        try:
            with prefer_backend("torch"):  # the compiler cannot look into the kernels of fla
                yield
        finally:
            for layer, _ in self.layers[model]:
                del layer.forward  # the class's own comes forth again


def wants_compilation(recipe: Recipe, stage: str, device: torch.device) -> bool:
    """Whether this stage is to be compiled; see RunConfig.compile. Documents told apart would need code for every length."""
    run = recipe.run
    if stage != "distill" or run.deepspeed is not None or run.gradient_checkpointing or recipe.data.respect_documents:
        return False
    return device.type == "cuda" if run.compile is None else run.compile


def compile_model(model: nn.Module, batch: dict[str, torch.Tensor]) -> bool:
    """
    Compile a DistillModel, if a step forward and backward on `batch` shows that this works; else leave it as it was and say
    why on stderr. A step that runs out of memory raises torch.OutOfMemoryError.
    """
    training = model.training
    model.compiled = CompiledParts(model.student, model.teacher)
    try:
        model.train()(**batch)["loss"].backward()
        return True
    except torch.OutOfMemoryError:
        model.compiled = None
        raise
    except Exception as error:  # of the compiler, the driver, Triton: all that matters is that it does not work
        model.compiled = None
        reason = next(iter(str(error).strip().splitlines()), "")
        print(f"dijiang: torch.compile fails here ({type(error).__name__}: {reason}); going on without it", file=sys.stderr)
        return False
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)

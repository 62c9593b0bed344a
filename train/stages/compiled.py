"""The distill stage through torch.compile, which on a GPU merges the many small passes of a layer and of the loss."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from dijiang.common.errors import print_line
from dijiang.modeling import DiJiangForCausalLM
from dijiang.modeling.linear_attention import prefer_backend

from ..recipe.schema import Recipe
from .distillation_loss import dense_rows

BACKEND = "inductor"  # of torch.compile


class CompiledParts:
    """
    The compiled parts of a recovery model. Each is compiled at its first call, once for each shape of the inputs. Layers of
    one kind share their code, so a model compiles in the time of one layer.

    Attributes:
        layers: by model, its layers and their compiled `forward`.
        rows: compiled form of `dense_rows`.
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
        """Run the layers of `model`, the student or the teacher, compiled in the block, each as one piece of code."""
        for layer, call in self.layers[model]:
            layer.forward = call
        try:
            with prefer_backend("torch"):  # the compiler cannot trace the kernels of fla
                yield
        finally:
            for layer, _ in self.layers[model]:
                del layer.forward  # reveals the method of the class again


def wants_compilation(recipe: Recipe, stage: str, device: torch.device) -> bool:
    """Decide whether to compile this stage; see RunConfig.compile. Separate documents would need code for every length."""
    run = recipe.run
    if recipe.distill is not None and recipe.distill.least_memory < 1:  # it would need code for every window
        return False
    if stage != "distill" or run.deepspeed is not None or run.gradient_checkpointing or recipe.data.respect_documents:
        return False
    return device.type == "cuda" if run.compile is None else run.compile


def compile_model(model: nn.Module, batch: dict[str, torch.Tensor]) -> bool:
    """
    Compile a DistillModel and try it in a step forward and backward on `batch`; if that fails, undo it, say why on stderr and
    return False. A step that runs out of memory raises torch.OutOfMemoryError.
    """
    training = model.training
    model.compiled = CompiledParts(model.student, model.teacher)
    try:
        model.train()(**batch)["loss"].backward()
        return True
    except torch.OutOfMemoryError:
        model.compiled = None
        raise
    except Exception as error:  # from the compiler, the driver or Triton; whatever it is, compilation does not work here
        model.compiled = None
        reason = next(iter(str(error).strip().splitlines()), "")
        print_line(f"torch.compile fails here ({type(error).__name__}: {reason}); continuing without it")
        return False
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)

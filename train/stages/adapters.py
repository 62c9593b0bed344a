"""Low-rank adapters (LoRA, arXiv 2106.09685) on a student's matrices, through peft, and their merged weights."""

from collections.abc import Iterable, Mapping

import torch

from dijiang.modeling import DiJiangForCausalLM

ADAPTER = "default"  # peft's name of the first adapter
DOWN, UP = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


def add_adapters(student: DiJiangForCausalLM, modules: Iterable[str], rank: int, alpha: float, seed: int = 0) -> None:
    """
    Add an adapter to each of `modules`, names of linear layers in `student`, which stays a `DiJiangForCausalLM`. Adapters are
    float32 and change nothing at first; `seed` draws the half that does not start at 0. All other parameters are frozen.

    Raises:
        ValueError: if peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("lora_rank needs the package peft; install it with: pip install 'dijiang[train]'") from None
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(modules), lora_dropout=0.0, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, student, adapter_name=ADAPTER)
    for name, parameter in student.named_parameters():
        adapter = name.endswith((DOWN, UP))
        parameter.requires_grad_(adapter)
        if adapter:
            parameter.data = parameter.data.float()


def merged_state(student: DiJiangForCausalLM, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """
    What training has changed, by the names of a checkpoint: the parameters that train, and the matrices that have an adapter,
    merged with it in float32.

    Args:
        student: the trained model.
        state: values of its parameters by name, if the student itself holds only shards of them.
    """
    values = dict(student.named_parameters()) if state is None else state
    merged = {}
    for name, parameter in student.named_parameters():
        if name.endswith(DOWN):
            module = name.removesuffix(DOWN)
            scale = student.get_submodule(module).scaling[ADAPTER]
            base = values[f"{module}.base_layer.weight"].detach().float()
            change = values[module + UP].detach().float() @ values[module + DOWN].detach().float()
            merged[f"{module}.weight"] = base + scale * change
        elif parameter.requires_grad and not name.endswith(UP):
            merged[name] = values[name].detach()
    return merged

"""Low-rank adapters (LoRA, arXiv 2106.09685) on a student's matrices, through peft, and the plain weights they amount to."""

from collections.abc import Iterable, Mapping

import torch

from dijiang.modeling import DiJiangForCausalLM

ADAPTER = "default"  # peft's own name of the first adapter
DOWN, UP = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


def add_adapters(student: DiJiangForCausalLM, modules: Iterable[str], rank: int, alpha: float, seed: int = 0) -> None:
    """
    Put an adapter beside each of `modules`, names of linear layers in `student`, which stays a `DiJiangForCausalLM`. Adapters
    are float32 and start at a change of 0; their other half is drawn from `seed`. All other parameters are frozen.

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
    What training has changed, by the names of a checkpoint: the parameters that train, and the matrices that have an adapter
    with it merged, in float32.

    Args:
        state: by name, the values of the student's parameters, where the student itself holds only shards of them.
    """
    values = dict(student.named_parameters()) if state is None else state
    found = {}
    for name, parameter in student.named_parameters():
        if name.endswith(DOWN):
            module = name.removesuffix(DOWN)
            scale = student.get_submodule(module).scaling[ADAPTER]
            base, down, up = (values[module + part].detach().float() for part in (".base_layer.weight", DOWN, UP))
            found[f"{module}.weight"] = base + scale * (up @ down)
        elif parameter.requires_grad and not name.endswith(UP):
            found[name] = values[name].detach()
    return found

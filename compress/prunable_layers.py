"""The weights that are pruned: every linear layer inside the decoder layers of any Hugging Face decoder."""

from collections.abc import Collection, Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """
    Find the decoder layers of a causal language model, and the name of the list that holds them.

    Raises:
        ValueError: if the model has no such list, or more than one.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    fitting = [(name, module) for name, module in lists if len(module) == count and has_matrices(module)]
    outermost = [(name, module) for name, module in fitting if not any(name.startswith(f"{other}.") for other, _ in fitting)]
    if len(outermost) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(outermost)} lists of {count} layers with linear weights, and one was expected; "
            "only plain decoders can be pruned"
        )
    return outermost[0]


def has_matrices(layers: nn.ModuleList) -> bool:
    return any(isinstance(part, (nn.Linear, Conv1D)) for part in layers.modules())


def refuse_uncalled(names: Iterable[str], called: Collection[str]) -> None:
    """Raise ValueError unless all these matrices were called when their decoder layer ran."""
    if idle := set(names) - set(called):
        raise ValueError(f"{min(idle)} is never called as a layer, so its inputs are unknown; it cannot be pruned")


def layer_targets(layer: nn.Module, name: str, excluded: tuple[str, ...]) -> list[str]:
    """
    Names, within one decoder layer, of its linear layers that are pruned.

    Args:
        layer: the decoder layer.
        name: of the layer, for messages.
        excluded: names of submodules that are not pruned, such as feature maps.

    Raises:
        ValueError: if it has none, or holds weights of a kind that would silently stay dense.
    """
    targets = []
    for part_name, part in layer.named_modules():
        if set(part_name.split(".")) & set(excluded):
            continue
        if isinstance(part, nn.Linear):
            targets.append(part_name)
            continue
        wide = [key for key, tensor in part.named_parameters(recurse=False) if tensor.dim() >= 2]
        if wide:
            kind = type(part).__name__
            why = "its weights are transposed" if isinstance(part, Conv1D) else f"its {wide[0]} is no nn.Linear's"
            raise ValueError(f"{name}.{part_name} is a {kind}, which cannot be pruned ({why}); only nn.Linear layers can")
    if not targets:
        raise ValueError(f"{name} ({type(layer).__name__}) has no nn.Linear layer, so there is nothing to prune in it")
    return targets

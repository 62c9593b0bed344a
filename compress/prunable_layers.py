"""Which weights are pruned: every linear layer inside the decoder layers, of any Hugging Face decoder."""

from collections.abc import Collection, Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """
    The decoder layers of a causal language model, with the name of the list that holds them.

    Raises:
        ValueError: if the model has no such list, or more than one.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = [(name, module) for name, module in lists if len(module) == count and has_matrices(module)]
    outermost = [(name, module) for name, module in found if not any(name.startswith(f"{other}.") for other, _ in found)]
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


def layer_targets(layer: nn.Module, name: str, kept: tuple[str, ...]) -> dict[str, nn.Linear]:
    """
    The linear layers of one decoder layer that are pruned, by their names in it.

    Args:
        name: of the layer, for messages.
        kept: names of submodules that stay as they are, such as feature maps.

    Raises:
        ValueError: if it has none, or holds weights of a kind that would silently stay dense.
    """
    found = {}
    for part_name, part in layer.named_modules():
        if set(part_name.split(".")) & set(kept):
            continue
        if isinstance(part, nn.Linear):
            found[part_name] = part
            continue
        wide = [key for key, tensor in part.named_parameters(recurse=False) if tensor.dim() >= 2]
        if wide:
            kind = type(part).__name__
            why = "its weights are transposed" if isinstance(part, Conv1D) else f"its {wide[0]} is no nn.Linear's"
            raise ValueError(f"{name}.{part_name} is a {kind}, which cannot be pruned ({why}); only nn.Linear layers can")
    if not found:
        raise ValueError(f"{name} ({type(layer).__name__}) has no nn.Linear layer, so there is nothing to prune in it")
    return found

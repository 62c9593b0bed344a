"""Contents of the pruned folders of a small LLaMA."""

from safetensors.torch import load_file

WEIGHTS = "model.safetensors"
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
PARTS = [f"self_attn.{part}" for part in ATTENTION] + [f"mlp.{part}" for part in MLP]
TARGETS = [f"model.layers.{layer}.{part}.weight" for layer in range(2) for part in PARTS]
UNIFORM = {"granularity": "uniform"}
MAGNITUDE = UNIFORM | {"score": "magnitude", "calibration": ()}


def zeros(folder, names=TARGETS):
    """Masks of exact zeros, by name."""
    stored = load_file(folder / WEIGHTS)
    return {name: stored[name] == 0 for name in names}


def inputs_of(layer, names):
    """By name, a list to which the inputs of the linear layer, (tokens, C), are appended from now on."""
    seen = {name: [] for name in names}
    for name, to in seen.items():
        layer.get_submodule(name).register_forward_pre_hook(lambda _, args, to=to: to.append(args[0].flatten(0, 1).double()))
    return seen


def same_bytes(a, b):
    return (a / WEIGHTS).read_bytes() == (b / WEIGHTS).read_bytes()


def sizes_of(decoder):
    """Weights of each matrix that a streamed decoder prunes, by name."""
    return {name: decoder.model.get_parameter(f"{name}.weight").numel() for layer in decoder.targets for name in layer}

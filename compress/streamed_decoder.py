"""A causal language model with one decoder layer at a time in memory; its weights stay on disk."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from dijiang.checkpoint.weights import SafetensorsFile, WeightFile
from dijiang.common.errors import one_line
from dijiang.common.perplexity import target_losses

from .prunable_layers import find_layers, layer_targets

COMPUTE = torch.float32  # Hessians, their inverses and the updates need it
OTHER_NAMES = {"lm_head.weight": "embed_out.weight"}  # GPT-NeoX's in files, and up to transformers 5.16 in the model too


class Recorded(Exception):
    """All layers' arguments are recorded, so that the forward pass can stop."""


def refuse_encoder(config: PreTrainedConfig, name: str) -> None:
    """Raise ValueError on the config of an encoder, from which transformers would build a decoder all the same."""
    kinds = config.architectures or []
    masked = [kind for kind in kinds if kind.endswith(("ForMaskedLM", "ForPreTraining"))]
    if masked or getattr(config, "is_encoder_decoder", False):
        kind = (masked or kinds or [type(config).__name__])[0]
        raise ValueError(f"{name} is a {kind}, not a causal language model; only plain decoders can be pruned")


class StreamedDecoder:
    """
    A model built without its decoder layers' weights. It computes in float32 whatever dtype is stored.

    Args:
        config: of a causal language model.
        files: its weights.
        name: the user's name for it, for messages.
        device: where layers are computed.

    Attributes:
        layers: the decoder layers, without weights except within `layer`.
        prefix: the name of their list.
        targets: names in the model of the linear layers that are pruned, layer by layer.
        files: the weight files.
        dense_places: file of each tensor and its name there, by its name in the model.

    Raises:
        ValueError: if transformers cannot build it, its weights are not those of the config, or it is no plain decoder.
    """

    def __init__(self, config: PreTrainedConfig, files: list[WeightFile], name: str, device: torch.device | str = "cpu"):
        self.name = name
        self.device = torch.device(device)
        self.files = files
        refuse_encoder(config, name)
        try:
            with init_empty_weights(include_buffers=False):  # buffers such as rotary tables are computed, not stored
                self.model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
        except Exception as error:
            raise ValueError(f"transformers cannot build {name}: {one_line(error)}") from None
        self.model.requires_grad_(False)
        self.prefix, self.layers = find_layers(self.model)
        # the parameters that linear attention adds are not pruned
        excluded = tuple(getattr(self.model, "_keep_in_fp32_modules_strict", None) or ())
        self.targets = [
            [f"{self.prefix}.{i}.{part}" for part in layer_targets(layer, f"{self.prefix}.{i}", excluded)]
            for i, layer in enumerate(self.layers)
        ]
        self.places = self.find_tensors(files)
        outside = [key for key in self.places if not key.startswith(f"{self.prefix}.")]
        self.fill(outside)
        self.tie_weights()
        self.dense_places = dict(self.places)
        for _, buffer_owner in self.model.named_modules():
            for key, buffer in buffer_owner._buffers.items():
                if buffer is not None:
                    buffer_owner._buffers[key] = buffer.to(self.device)
        self.contexts: dict[tuple[int, int], list[tuple[tuple, dict]]] = {}
        self.gives_tuples = False  # whether layers return tuples, as those of some families do

    def find_tensors(self, files: list[WeightFile]) -> dict[str, tuple[WeightFile, str]]:
        """File of each tensor of the model and its name there, by its name in the model."""
        stored = {name: (file, name) for file in files for name in file.headers}
        wanted = dict(self.model.state_dict())
        base = f"{self.model.base_model_prefix}."
        tied = set(self.model.all_tied_weights_keys)
        places, missing = {}, []
        for key, tensor in wanted.items():
            # some checkpoints hold the model without its head
            spellings = (key, key.removeprefix(base), OTHER_NAMES.get(key, key))
            place = next((stored[spelling] for spelling in spellings if spelling in stored), None)
            if place is None:
                if key not in tied and tensor.is_meta:
                    missing.append(key)
                continue
            shape = tuple(place[0].headers[place[1]].shape)
            if shape != tuple(tensor.shape):
                raise ValueError(f"{self.name}: {key} has shape {shape}, its config says {tuple(tensor.shape)}")
            if not place[0].headers[place[1]].dtype.is_floating_point:
                raise ValueError(f"{self.name}: {key} is not a float tensor, so the model is quantized; prune the original")
            places[key] = place
        if missing:
            raise ValueError(
                f"{self.name} lacks {len(missing)} tensors of its architecture, such as {missing[0]}; load it with "
                "transformers and save it again, then prune that"
            )
        return places

    def tie_weights(self) -> None:
        """Share tensors that the config ties, unless the files hold two different ones: transformers loads both then."""
        tied = self.model.all_tied_weights_keys
        stored = {key: other for key, other in tied.items() if key in self.places and other in self.places}
        if any(not torch.equal(self.model.get_parameter(key), self.model.get_parameter(x)) for key, x in stored.items()):
            self.model.config.tie_word_embeddings = False
            return
        for key in stored:
            del self.places[key]
        self.model.tie_weights()

    def read(self, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield tensors by their names in the model, as stored."""
        for name in names:
            file, stored = self.places[name]
            for _, tensor in file.tensors([stored]):
                yield name, tensor

    def fill(self, names: list[str]) -> None:
        """Load tensors into the model, by their names in it."""
        for name, tensor in self.read(names):
            module, _, leaf = name.rpartition(".")
            owner = self.model.get_submodule(module)
            # a copy, for files may be mapped
            value = tensor.to(self.device, COMPUTE if tensor.is_floating_point() else tensor.dtype, copy=True)
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                owner._buffers[leaf] = value

    def replace(self, path: Path) -> None:
        """Read the tensors of this safetensors file from now on in place of the stored ones."""
        file = SafetensorsFile(path)
        self.places |= {name: (file, name) for name in file.headers}

    def stored_dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor on disk, by its name in the model."""
        file, stored = self.dense_places[name]
        return file.headers[stored].dtype

    @property
    def n_parameters(self) -> int:
        """Parameters of the whole model, tied ones counted once."""
        return sum(math.prod(file.headers[stored].shape) for file, stored in self.dense_places.values())

    @property
    def n_targeted(self) -> int:
        """Weights that may be pruned."""
        return sum(self.model.get_parameter(f"{name}.weight").numel() for layer in self.targets for name in layer)

    def names_of(self, index: int) -> list[str]:
        """Names of the tensors of one layer."""
        return [name for name in self.places if name.startswith(f"{self.prefix}.{index}.")]

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Yield a layer with its weights, which are dropped when the block ends."""
        self.fill(self.names_of(index))
        try:
            yield self.layers[index]
        finally:
            for module in self.layers[index].modules():
                for leaf, parameter in module._parameters.items():
                    if parameter is not None:
                        empty = torch.empty_like(parameter, device="meta")
                        module._parameters[leaf] = nn.Parameter(empty, requires_grad=False)

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """Yield the model with all weights in memory and attention that can be differentiated twice."""
        attention = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        try:
            with ExitStack() as stack:
                for index in range(len(self.layers)):
                    stack.enter_context(self.layer(index))
                yield self.model
        finally:
            self.model.set_attn_implementation(attention)

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Input of the first layer, (B, T, hidden), for tokens (B, T)."""
        hidden = self.trace(tokens)
        if len({tuple(x.shape) for x in hidden}) > 1:  # the model took the first row for the first of a tuple
            self.gives_tuples = True
            hidden = self.trace(tokens)
        return hidden[0]

    def trace(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Record the arguments of all layers, which compute nothing meanwhile; returns the input of each."""
        seen = []
        arguments = []

        def stub(hidden, *args, **kwargs):
            seen.append(hidden)
            arguments.append((args, kwargs))
            if len(seen) == len(self.layers):
                raise Recorded
            return (hidden,) if self.gives_tuples else hidden

        with self.stubs(stub):
            try:
                self.model(input_ids=tokens.to(self.device), use_cache=False)
            except Recorded:
                pass
            except (RuntimeError, IndexError, ValueError) as error:
                if self.gives_tuples or len(seen) < 2:
                    raise ValueError(f"{self.name} cannot be run layer by layer: {one_line(error)}") from None
        self.contexts[tuple(tokens.shape)] = arguments
        return seen

    @contextmanager
    def stubs(self, stub) -> Iterator[None]:
        """Replace all layers by `stub` within the block."""
        for layer in self.layers:
            layer.forward = stub
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def run(self, layer: nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Output of layer `index`, loaded as `layer`, for (B, T, hidden) from `embed` or the layer before."""
        args, kwargs = self.contexts[tuple(hidden.shape[:2])][index]
        output = layer(hidden, *args, **kwargs)
        if isinstance(output, tuple):
            self.gives_tuples = True  # `embed` cannot tell if there is one layer alone
            return output[0]
        return output

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) for the last layer's output (B, T, hidden), to which gradients flow."""
        calls = 0

        def stub(unused, *args, **kwargs):
            nonlocal calls
            calls += 1
            result = hidden if calls == len(self.layers) else unused
            return (result,) if self.gives_tuples else result

        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
        with self.stubs(stub):
            return self.model(input_ids=tokens, use_cache=False).logits

    def losses(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Next-token cross-entropy of each sequence in nats, summed over its T - 1 predictions: (B,)."""
        logits = self.logits(hidden)[:, :-1].flatten(0, 1)
        losses = target_losses(logits, tokens[:, 1:].flatten().to(self.device))
        return losses.view(len(tokens), -1).sum(1)

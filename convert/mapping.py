"""Tensors of a source under our names: which ones there must be, whether they are sound, and a stream of them."""

from collections.abc import Collection, Iterable, Iterator

import torch

from dijiang.checkpoint.source import Source
from dijiang.checkpoint.weights import WeightFile
from dijiang.common.errors import one_line
from dijiang.modeling import DiJiangConfig, DiJiangForCausalLM
from dijiang.modeling.decoder_modules import ProjectedAttention
from dijiang.modeling.linear_attention_layer import DiJiangLinearAttention

from .families import FAMILIES

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def build_on_meta(config: DiJiangConfig) -> DiJiangForCausalLM:
    """The model of `config` without memory for its weights."""
    try:
        with torch.device("meta"):
            return DiJiangForCausalLM(config)
    except (AssertionError, ArithmeticError, KeyError, RuntimeError) as error:
        raise ValueError(f"the source's config makes no model: {type(error).__name__}: {one_line(error)}") from None


def new_modules(model: DiJiangForCausalLM) -> dict[str, torch.nn.Module]:
    """Modules, by name, that linear layers add to the source's attention."""
    shared: set[str] = set()
    added: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, DiJiangLinearAttention):
            if not shared:
                with torch.device("meta"):
                    shared = {child for child, _ in ProjectedAttention(model.config, 0).named_children()}
            added |= {f"{name}.{child}": part for child, part in module.named_children() if child not in shared}
    return added


def fill_new_modules(model: DiJiangForCausalLM) -> dict[str, torch.Tensor]:
    """
    Give the new modules of a model on meta memory and their initial values, float32 and the same for the same
    `feature_seed`. Returns their parameters by name.
    """
    filled: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(model.config.feature_seed)  # torch.manual_seed would reseed GPUs too
        for name, module in new_modules(model).items():
            module.to_empty(device="cpu").float()
            for part in module.modules():
                model._init_weights(part)
            filled |= {f"{name}.{key}": parameter.detach() for key, parameter in module.named_parameters()}
    return filled


class MappedWeights:
    """
    Weights of a source under our names; only their headers are read at first.

    If the source's head differs from its embedding although its config ties them, `model.config.tie_word_embeddings` is set to
    False, as transformers does.

    Args:
        source: the model.
        files: its weight files.
        model: the DiJiang model, on meta.

    Raises:
        ValueError: if names or shapes do not fit the model, or the weights are quantized.
    """

    def __init__(self, source: Source, files: list[WeightFile], model: DiJiangForCausalLM):
        self.source, self.files, self.config = source, files, model.config
        self.expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for name in new_modules(model):
            self.expected = {key: shape for key, shape in self.expected.items() if not key.startswith(f"{name}.")}
        self.headers: dict[str, torch.Tensor] = {}
        self.our_names: dict[str, list[str]] = {}
        for file in files:
            for name, header in file.headers.items():
                self.add(file, name, header)
        self.skipped = self.settle_tying()
        self.check()

    def map(self, name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        try:
            return list(FAMILIES[self.source.config.model_type].map_tensor(name, tensor, self.config))
        except RuntimeError:
            raise ValueError(
                f"{self.source.name}: {name} has shape {tuple(tensor.shape)}, which does not fit its config; "
                "weights and config.json must come from one model"
            ) from None

    def add(self, file: WeightFile, name: str, header: torch.Tensor) -> None:
        for our_name, part in self.map(name, header):
            if our_name in self.headers:
                raise ValueError(f"{self.source.name} holds {our_name} twice, once as {name} in {file.path.name}")
            if not part.dtype.is_floating_point or part.dtype.itemsize == 1:
                raise ValueError(
                    f"{self.source.name}: {name} is not a float tensor, so the source is quantized; convert the "
                    "model it was made from"
                )
            self.headers[our_name] = part
            self.our_names.setdefault(name, []).append(our_name)

    def settle_tying(self) -> set[str]:
        """Compare head and embedding if both are stored though tied; returns the names to leave out."""
        if not self.config.tie_word_embeddings:
            return set()
        self.expected.pop(HEAD)
        if HEAD not in self.headers or EMBEDDING not in self.headers:
            return set()
        stored: dict[str, torch.Tensor] = {}
        for file in self.files:
            wanted = [name for name in file.headers if {HEAD, EMBEDDING} & set(self.our_names.get(name, ()))]
            stored |= {self.our_names[name][0]: tensor for name, tensor in file.tensors(wanted)}
        if torch.equal(stored[HEAD], stored[EMBEDDING]):
            return {HEAD}
        self.config.tie_word_embeddings = False
        self.expected[HEAD] = self.expected[EMBEDDING]
        return set()

    def check(self) -> None:
        """Raise ValueError on missing, unexpected or mis-shaped tensors."""
        check_shapes(
            {name: tuple(header.shape) for name, header in self.headers.items() if name not in self.skipped},
            self.expected,
            self.source.name,
        )

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the source: as its config says, else of its embedding."""
        stated = self.source.config.dtype
        return stated if isinstance(stated, torch.dtype) else self.headers[EMBEDDING].dtype

    @property
    def n_bytes(self) -> int:
        return sum(header.nbytes for name, header in self.headers.items() if name not in self.skipped)

    def stream(self, dtype: torch.dtype | None, *, copy: bool = False) -> Iterator[tuple[WeightFile, str, torch.Tensor]]:
        """
        Every tensor once, file by file, with our name.

        Args:
            dtype: to cast to; None keeps each as stored.
            copy: give memory of its own also to what is mapped from disk.

        Raises:
            ValueError: on values that are not finite, stored so or after the cast.
        """
        for file in self.files:
            for name, tensor in file.tensors([name for name in file.headers if name in self.our_names]):
                for our_name, part in self.map(name, tensor):
                    if our_name in self.skipped:
                        continue
                    if not is_finite(part):
                        raise ValueError(f"{self.source.name}: {name} in {file.path.name} holds NaN or infinite values")
                    if dtype and part.dtype != dtype:
                        part = part.to(dtype)
                        if not is_finite(part):
                            raise ValueError(f"{self.source.name}: {name} overflows {dtype}; choose bfloat16 or float32")
                    elif copy and not file.in_memory:
                        part = part.clone()
                    yield file, our_name, part


def is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()  # both are NaN if any value is; needs no memory, unlike isfinite(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_shapes(shapes: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], where: str) -> None:
    """Raise ValueError on missing, unexpected or mis-shaped tensors, naming up to three and their count."""
    advice = "; the files are incomplete or belong to another model"
    for problem, names in (("lacks", expected.keys() - shapes.keys()), ("holds unexpected", shapes.keys() - expected.keys())):
        if names:
            raise ValueError(f"{where} {problem} {count(names)}: {listed(names)}{advice}")
    wrong = [name for name in shapes if shapes[name] != expected[name]]
    if wrong:
        details = [f"{name} {list(shapes[name])}, expected {list(expected[name])}" for name in sorted(wrong)]
        raise ValueError(f"{where} holds {count(wrong)} of a wrong shape: {listed(details, '; ')}{advice}")


def count(names: Collection[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"


def listed(names: Iterable[str], separator: str = ", ") -> str:
    ordered = sorted(names)
    return separator.join(ordered[:3]) + (separator + "..." if len(ordered) > 3 else "")

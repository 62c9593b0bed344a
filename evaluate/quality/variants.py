"""
The models that an evaluation compares: the teacher; the student; the training-free baseline and the ablations of the student,
which say how much of its score the linear branches earn, for often they are idle (arXiv 2510.05901; training-free baseline:
arXiv 2608.28444); and further baselines that a user names.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dijiang.checkpoint.provenance import hash_files, public_name, read_provenance
from dijiang.checkpoint.source import Source, load_tokenizer
from dijiang.convert import load_source
from dijiang.convert.families import open_convertible
from dijiang.modeling import DiJiangConfig

from .ablations import linear_only, no_attention, no_memory, window_only

# the training-free baseline has at least these, also next to a student whose own window is smaller
BASELINE_WINDOW = 64
BASELINE_SINKS = 4
WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
NO_WINDOW = "the student has no window"
WITHOUT_LINEAR = "DiJiang without the linear branch"
BASELINE_PREFIX = "beside:"  # of the keys of a user's baselines in results


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """
    One column of an evaluation: a model, as it is or with a part taken away.

    Attributes:
        key: its name in results.
        title: its name for readers.
        model: the model in memory: "teacher", "window_sinks", "student" or the key of a user's baseline.
        ablation: context manager that takes a part of the model away while it is measured.
        left_out: why there is no such variant; None if there is.
    """

    key: str
    title: str
    model: str
    ablation: Callable[..., AbstractContextManager] = nullcontext
    left_out: str | None = None


@dataclass(kw_only=True)
class Comparison:
    """
    A DiJiang checkpoint, its teacher and a user's baselines, opened but not loaded.

    Attributes:
        student: the DiJiang checkpoint.
        teacher: the softmax model.
        baselines: the user's baselines, by key.
        dtype: dtype that models are loaded in.
        device: type of the device that they are measured on.
        provenance: the student's record.
        tokenizer: the tokenizer of all models.
        identity: hashes that tell what each model is, by the model's name.
    """

    student: Source
    teacher: Source
    baselines: dict[str, Source] = field(default_factory=dict)
    dtype: torch.dtype
    device: str
    provenance: dict = field(init=False)
    tokenizer: object = field(init=False)
    identity: dict[str, dict] = field(init=False)

    def __post_init__(self) -> None:
        config = self.student.config
        if not self.student.is_dijiang or not config.has_linear_layers:
            what = f"{config.model_type} model" if not self.student.is_dijiang else "DiJiang model without linear layers"
            raise ValueError(
                f"{self.student.name} is a {what}; give a checkpoint with linear layers, made with `dijiang convert`"
            )
        if self.teacher.is_dijiang:
            raise ValueError(f"the teacher {self.teacher.name} is a DiJiang model; give the softmax model that it came from")
        self.provenance = read_provenance(self.student.folder)
        self.tokenizer = load_tokenizer(self.student)
        refuse_other_tokenizer(self.tokenizer, load_tokenizer(self.teacher), self.student.name, self.teacher.name)
        for source in self.baselines.values():
            names = (self.student.name, source.name)
            refuse_other_tokenizer(self.tokenizer, load_tokenizer(source), *names, advice="leave the second one out")
        self.identity = {key: identity_of(source) for key, source in self.sources.items()}
        self.identity["window_sinks"] = self.identity["teacher"] | self.window_sinks_settings()

    @property
    def sources(self) -> dict[str, Source]:
        """The models that are measured as they are, by the keys of their variants."""
        return {"teacher": self.teacher, "student": self.student, **self.baselines}

    @property
    def context(self) -> int:
        """Tokens that every model was made for."""
        return min(source.config.max_position_embeddings for source in self.sources.values())

    @property
    def same_heads(self) -> bool:
        """Whether the student has the teacher's layers and heads."""
        student, teacher = self.student.config, self.teacher.config
        return all(getattr(student, key) == getattr(teacher, key) for key in ("num_hidden_layers", "num_attention_heads"))

    @property
    def no_maps(self) -> str | None:
        """Why the student's attention cannot be compared with the teacher's head by head; None if it can."""
        if not self.same_heads:
            return "teacher and student differ in layers or heads"
        if any(self.student.config.full_heads) or has_memory(self.student.config):
            return "maps are drawn of window, sinks and linear branch, and the student has kept heads or an exact memory"
        return None

    def window_sinks_settings(self) -> dict:
        """Settings of the training-free baseline: the student's layers, window and sinks, for the teacher's weights."""
        config = self.student.config
        return {
            "layer_types": list(config.layer_types) if self.same_heads else "linear_attention",
            "attention_window": max(config.attention_window, BASELINE_WINDOW),
            "attention_sinks": max(config.attention_sinks, BASELINE_SINKS),
        }

    def variants(self) -> list[Variant]:
        """All columns: the teacher first, since others are compared with its answers, the user's baselines last."""
        config = self.student.config
        baseline = self.window_sinks_settings()
        near = f"window {baseline['attention_window']} + {baseline['attention_sinks']} sinks"
        own = f"window {config.attention_window} + {config.attention_sinks} sinks"
        missing = None if config.attention_window else NO_WINDOW
        slots, kept = has_memory(config), any(config.full_heads)
        ablations = (
            ("window_only", WITHOUT_LINEAR if slots or kept else f"DiJiang, {own} alone", window_only, missing),
            *([("no_memory", "DiJiang without exact memory", no_memory, None)] if slots else []),
            ("linear_only", f"DiJiang, linear branch {'and kept heads ' if kept else ''}alone", linear_only, missing),
            ("no_attention", "DiJiang, linear layers without attention", no_attention, None),
        )
        return [
            Variant(key="teacher", title="teacher (softmax attention)", model="teacher"),
            Variant(key="window_sinks", title=f"teacher with {near}, training-free", model="window_sinks"),
            Variant(key="student", title="DiJiang", model="student"),
            *(
                Variant(key=key, title=title, model="student", ablation=ablation, left_out=left_out)
                for key, title, ablation, left_out in ablations
            ),
            *(Variant(key=key, title=baseline_title(source), model=key) for key, source in self.baselines.items()),
        ]

    @contextmanager
    def loaded(self, model: str) -> Iterator[torch.nn.Module]:
        """Load one of the models by its name, on the device, for the length of a block."""
        training_free = model == "window_sinks"
        source = self.teacher if training_free else self.sources[model]
        settings = self.window_sinks_settings() if training_free else {}
        loaded_model, _ = load_source(source.gguf or source.folder, dtype=self.dtype, **settings)
        yield loaded_model.to(self.device)


def has_memory(config: DiJiangConfig) -> bool:
    """Whether a linear layer of a DiJiang model has slots of exact memory."""
    layers = [i for i, kind in enumerate(config.layer_types) if kind == "linear_attention"]
    return any(config.memory_slots(i)[head] for i in layers for head in config.linear_heads(i))


def compare(
    student: str | Path, teacher: str | Path, *, baselines: Sequence[str | Path] = (), dtype: torch.dtype, device: str
) -> Comparison:
    """
    Open all models.

    Args:
        student: DiJiang checkpoint, folder or hub id.
        teacher: softmax model: hub id, folder or GGUF file.
        baselines: further models, each of another public name.
        dtype: dtype to load models in.
        device: type of the device to measure on.

    Raises:
        ValueError: if one cannot be opened, the student is no model with linear layers or the teacher is one, or their
            tokenizers differ.
    """
    sources = {"student": open_convertible(student), "teacher": open_convertible(teacher)}
    further = {f"{BASELINE_PREFIX}{public_name(name)}": open_convertible(name) for name in baselines}
    assert len(further) == len(baselines), "two baselines of one name"
    return Comparison(**sources, baselines=further, dtype=dtype, device=device)


def baseline_title(source: Source) -> str:
    """Title of a user's baseline."""
    linear = source.is_dijiang and source.config.has_linear_layers
    return f"{BASELINE_PREFIX} {public_name(source.name)} ({'DiJiang' if linear else 'softmax attention'})"


def zero_share(model: torch.nn.Module) -> float:
    """Sparsity of a model: the share of exact zeros in the linear weights of its decoder layers."""
    weights = [module.weight for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def refuse_other_tokenizer(
    ours, theirs, student: str, teacher: str, *, advice: str = "give the model that the student came from"
) -> None:
    """Raise ValueError, with `advice` at its end, unless both turn text into the same tokens."""
    own, other = ours.get_vocab(), theirs.get_vocab()
    probe = "The 2 quick (brown) foxes -\n\tdon't; naïve 你好 12345."
    if own != other:
        example = min(set(own.items()) ^ set(other.items()))[0]
        difference = f"differ ({len(own)} and {len(other)} entries; for example at {example!r})"
    elif ours(probe)["input_ids"] != theirs(probe)["input_ids"]:
        difference = "have one vocabulary but split text in two ways"
    else:
        return
    raise ValueError(
        f"the tokenizers of {public_name(student)} and {public_name(teacher)} {difference}, "
        f"so their scores cannot be compared; {advice}"
    )


def identity_of(source: Source) -> dict:
    """Hashes of a model's weight files, and its config."""
    return {"weights": file_hashes(source), "config": source.config.to_diff_dict()}


def file_hashes(source: Source) -> dict[str, str]:
    """SHA-256 of the files that hold a model's weights, by file name."""
    files = [source.gguf] if source.gguf else sorted(path for p in WEIGHT_PATTERNS for path in source.folder.glob(p))
    return hash_files(files)

"""
The models that stand beside one another in an evaluation: the teacher, the student, the controls that say what of the
student's score its linear branches earn, for often they are idle (arXiv 2510.05901; training-free control: arXiv 2608.28444),
and further models that a user names.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dijiang.checkpoint.provenance import hash_files, public_name, read_provenance
from dijiang.checkpoint.source import Source
from dijiang.convert import load_source
from dijiang.convert.families import open_convertible
from dijiang.convert.loader import load_tokenizer

from .ablations import linear_only, no_attention, window_only

# the training-free control has at least these, also beside a student whose own window is smaller
BASELINE_WINDOW, BASELINE_SINKS = 64, 4
WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
NO_WINDOW = "the student has no window"
BESIDE = "beside:"  # begins the keys of further models


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """
    One of the models compared.

    Attributes:
        key, title: its name in results and in words.
        model: which of the models in memory it is, "teacher", "window_sinks", "student" or a further one's key.
        control: what is taken away from that model while it is measured.
        left_out: why there is no such model; None if there is.
    """

    key: str
    title: str
    model: str
    control: Callable[..., AbstractContextManager] = nullcontext
    left_out: str | None = None


@dataclass(kw_only=True)
class Comparison:
    """
    A DiJiang checkpoint, its teacher and further models, opened but not loaded.

    Attributes:
        student, teacher, beside: what was opened, further models by their keys.
        provenance: the student's record.
        tokenizer: of all.
        identity: hashes of what each model is, by its name.
    """

    student: Source
    teacher: Source
    beside: dict[str, Source] = field(default_factory=dict)
    dtype: torch.dtype
    device: str
    provenance: dict = field(init=False)
    tokenizer: object = field(init=False)
    identity: dict[str, dict] = field(init=False)

    def __post_init__(self) -> None:
        config = self.student.config
        if not self.student.is_dijiang or not config.has_linear_layers:
            found = f"{config.model_type} model" if not self.student.is_dijiang else "DiJiang model without linear layers"
            raise ValueError(
                f"{self.student.name} is a {found}; give a checkpoint with linear layers, made with `dijiang convert`"
            )
        if self.teacher.is_dijiang:
            raise ValueError(f"the teacher {self.teacher.name} is a DiJiang model; give the softmax model that it came from")
        self.provenance = read_provenance(self.student.folder)
        self.tokenizer = load_tokenizer(self.student)
        refuse_other_tokenizer(self.tokenizer, load_tokenizer(self.teacher), self.student.name, self.teacher.name)
        for source in self.beside.values():
            names = (self.student.name, source.name)
            refuse_other_tokenizer(self.tokenizer, load_tokenizer(source), *names, advice="leave the second one out")
        teacher = identity_of(self.teacher)
        self.identity = {
            "teacher": teacher,
            "window_sinks": teacher | self.baseline(),
            "student": identity_of(self.student),
            **{key: identity_of(source) for key, source in self.beside.items()},
        }

    @property
    def sources(self) -> dict[str, Source]:
        """The models that are measured as they are, by the keys of their subjects."""
        return {"teacher": self.teacher, "student": self.student, **self.beside}

    @property
    def context(self) -> int:
        """Tokens that all models were made for."""
        return min(source.config.max_position_embeddings for source in self.sources.values())

    @property
    def same_heads(self) -> bool:
        """Whether the student's attention can be compared with the teacher's, layer by layer and head by head."""
        student, teacher = self.student.config, self.teacher.config
        return all(getattr(student, key) == getattr(teacher, key) for key in ("num_hidden_layers", "num_attention_heads"))

    def baseline(self) -> dict:
        """Settings of the training-free control: the student's layers, window and sinks, on the teacher's weights."""
        config = self.student.config
        return {
            "layer_types": list(config.layer_types) if self.same_heads else "linear_attention",
            "attention_window": max(config.attention_window, BASELINE_WINDOW),
            "attention_sinks": max(config.attention_sinks, BASELINE_SINKS),
        }

    def subjects(self) -> list[Subject]:
        """Teacher first, for others are measured by what it says; further models last."""
        config, base = self.student.config, self.baseline()
        missing = None if config.attention_window else NO_WINDOW
        near = f"window {base['attention_window']} + {base['attention_sinks']} sinks"
        own = f"window {config.attention_window} + {config.attention_sinks} sinks"
        return [
            Subject(key="teacher", title="teacher (softmax attention)", model="teacher"),
            Subject(key="window_sinks", title=f"teacher with {near}, training-free", model="window_sinks"),
            Subject(key="student", title="DiJiang", model="student"),
            Subject(key="window_only", title=f"DiJiang, {own} alone", model="student", control=window_only, left_out=missing),
            Subject(
                key="linear_only", title="DiJiang, linear branch alone", model="student", control=linear_only, left_out=missing
            ),
            Subject(
                key="no_attention", title="DiJiang, linear layers without attention", model="student", control=no_attention
            ),
            *(Subject(key=key, title=further_title(source), model=key) for key, source in self.beside.items()),
        ]

    @contextmanager
    def loaded(self, model: str) -> Iterator[torch.nn.Module]:
        """One of the models by its name, on the device, until the block ends."""
        source = self.teacher if model == "window_sinks" else self.sources[model]
        settings = self.baseline() if model == "window_sinks" else {}
        made, _ = load_source(source.gguf or source.folder, dtype=self.dtype, **settings)
        yield made.to(self.device)


def compare(
    student: str | Path, teacher: str | Path, *, beside: Sequence[str | Path] = (), dtype: torch.dtype, device: str
) -> Comparison:
    """
    Open all.

    Args:
        beside: further models, each of another public name.

    Raises:
        ValueError: if one cannot be opened, the student is no model with linear layers or the teacher is one, or their
            tokenizers differ.
    """
    opened = {"student": open_convertible(student), "teacher": open_convertible(teacher)}
    further = {f"{BESIDE}{public_name(name)}": open_convertible(name) for name in beside}
    assert len(further) == len(beside), "further models of one name"
    return Comparison(**opened, beside=further, dtype=dtype, device=device)


def further_title(source: Source) -> str:
    """A further model in words."""
    linear = source.is_dijiang and source.config.has_linear_layers
    return f"beside: {public_name(source.name)} ({'DiJiang' if linear else 'softmax attention'})"


def zero_share(model: torch.nn.Module) -> float:
    """How sparse a model is: the share of exact zeros in the linear weights of its decoder layers."""
    weights = [module.weight for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def refuse_other_tokenizer(
    ours, theirs, student: str, teacher: str, *, advice: str = "give the model that the student came from"
) -> None:
    """Raise ValueError, with `advice` at its end, unless both turn text into the same tokens."""
    own, other = ours.get_vocab(), theirs.get_vocab()
    probe = "The 2 quick (brown) foxes -\n\tdon't; naïve 你好 12345."
    if own != other:
        differ = min(set(own.items()) ^ set(other.items()))[0]
        found = f"differ ({len(own)} and {len(other)} entries; for example at {differ!r})"
    elif ours(probe)["input_ids"] != theirs(probe)["input_ids"]:
        found = "have one vocabulary but split text in two ways"
    else:
        return
    raise ValueError(
        f"the tokenizers of {public_name(student)} and {public_name(teacher)} {found}, so their scores cannot be compared; "
        f"{advice}"
    )


def identity_of(source: Source) -> dict:
    """What a model is: its weights and its config."""
    return {"weights": file_hashes(source), "config": source.config.to_diff_dict()}


def file_hashes(source: Source) -> dict[str, str]:
    """SHA-256 of the files that hold a model's weights, by name."""
    files = [source.gguf] if source.gguf else sorted(path for p in WEIGHT_PATTERNS for path in source.folder.glob(p))
    return hash_files(files)

"""Reads checkpoint files tensor by tensor: safetensors, torch's pickles, and models that transformers dequantised."""

import contextlib
import io
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from dijiang.common.errors import one_line

from .source import WEIGHTS, Source, read_json

FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@contextmanager
def no_library_bars() -> Iterator[None]:
    """Keep transformers' own progress bars off the screen within the block."""
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            logging.enable_progress_bar()


class SafetensorsFile:
    """One safetensors file; tensors are mapped from disk, so nothing is held."""

    in_memory = False

    def __init__(self, path: Path):
        self.path = path
        with self.open() as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            # integers stand for every type that is no float; all of them are refused
            self.headers = {
                name: torch.empty(part.get_shape(), dtype=FLOAT_TYPES.get(part.get_dtype(), torch.uint8), device="meta")
                for name, part in parts.items()
            }

    def open(self) -> Any:
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} is corrupt or cut short ({one_line(error)}); download it again") from None

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        with self.open() as file:
            for name in names:
                yield name, file.get_tensor(name)


class PickleFile:
    """One `.bin` file, loaded without running its code and mapped from disk where its format allows."""

    in_memory = False

    def __init__(self, path: Path):
        self.path = path
        self.headers = {name: torch.empty_like(tensor, device="meta") for name, tensor in self.load().items()}

    def load(self) -> dict[str, torch.Tensor]:
        try:
            try:
                content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # torch < 1.6 wrote no zip file, which cannot be mapped
                content = torch.load(self.path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise ValueError(f"{self.path} holds more than tensors, so loading it could run code; use safetensors") from None
        except Exception as error:
            raise ValueError(f"{self.path} is corrupt or cut short ({one_line(error)}); download it again") from None
        if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
            raise ValueError(f"{self.path} is not a dictionary of tensors; give a transformers checkpoint")
        return content

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        content = self.load()
        for name in names:
            yield name, content[name]


class DequantizedFile:
    """A GGUF file as transformers reads it: all of it at once, in float32."""

    in_memory = True

    def __init__(self, path: Path, config: PretrainedConfig, progress: bool):
        self.path = path
        try:
            with contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO()):
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    path.parent, config=config, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
                )
                model, report = loaded
        except Exception as error:
            raise ValueError(f"{path} cannot be read: {one_line(error)}") from None
        if missing := sorted(report["missing_keys"]):  # transformers has filled them with noise
            raise ValueError(f"{path} lacks {len(missing)} tensors, such as {', '.join(missing[:3])}; download it again")
        self.generation_config = model.generation_config
        self.state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self.headers = {name: torch.empty_like(tensor, device="meta") for name, tensor in self.state.items()}

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for name in names:
            yield name, self.state[name]


WeightFile = SafetensorsFile | PickleFile | DequantizedFile


def open_weights(source: Source, *, progress: bool = False) -> list[WeightFile]:
    """
    The source's weight files, their headers read, in order. `progress` lets transformers show its bar for a GGUF file.

    Raises:
        ValueError: if there are none, one is missing, cannot be read or is unsafe to read.
    """
    if source.gguf:
        return [DequantizedFile(source.gguf, deepcopy(source.config), progress)]
    for name in WEIGHTS:
        if paths := weight_paths(source.folder, name):
            return [SafetensorsFile(path) if name.endswith(".safetensors") else PickleFile(path) for path in paths]
    raise ValueError(f"{source.folder} holds no weights (none of {', '.join(WEIGHTS)}, nor their indexes)")


def weight_paths(folder: Path, name: str) -> list[Path]:
    """The file `name` in a folder or, where there is none, the shards that its index names; none if that is missing too."""
    index, single = folder / f"{name}.index.json", folder / name
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map; download it again")
    paths = [folder / file for file in sorted(set(weight_map.values()))]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{folder} lacks {path.name}, which {index.name} names; download it again")
    return paths

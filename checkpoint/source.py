"""Finds the model that a user names, a hub id, a folder or a GGUF file, and reads all of it but the weights."""

import importlib.util
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from dijiang.common.errors import one_line

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """
    A pretrained model, its weights not yet read.

    Attributes:
        name: what the user wrote.
        folder: where its files lie.
        gguf: the file, if that is what it is.
        config: its transformers config.
        commit: of the hub's repository, if known.
    """

    name: str
    folder: Path
    gguf: Path | None
    config: PretrainedConfig
    commit: str | None

    @property
    def is_dijiang(self) -> bool:
        return self.config.model_type == "dijiang"


def open_source(name: str | Path, *, model_types: Collection[str] | None = None) -> Source:
    """
    Find a model and read its config.

    Args:
        name: hub id, folder or GGUF file.
        model_types: the architectures to accept, by the config's `model_type`; None accepts all that transformers knows.

    Raises:
        ValueError: if there is no such model, or it is an adapter, quantized, or of another architecture.
    """
    path = Path(name).expanduser()
    gguf, commit = None, None
    if path.is_file():
        gguf, folder = checked_gguf(path), path.parent
    elif path.is_dir():
        folder = path
    else:
        folder = fetch(str(name))
        commit = folder.name
    config = read_gguf_config(gguf, model_types) if gguf else read_config(folder, model_types)
    return Source(name=str(name), folder=folder, gguf=gguf, config=config, commit=commit)


def checked_gguf(path: Path) -> Path:
    """`path` if it is a GGUF file that can be read here."""
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is a file, but not a GGUF file; give a GGUF file, a checkpoint's folder or a hub id")
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"reading {path.name} needs {' and '.join(missing)}; run: pip install {' '.join(missing)}")
    return path


def fetch(repository: str) -> Path:
    """Download (or find in the cache) a hub repository's weights and small files; returns its snapshot folder."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository):
        raise ValueError(f"{repository} is neither a folder, nor a GGUF file, nor a hub id such as EleutherAI/pythia-160m")
    offline = constants.HF_HUB_OFFLINE
    try:
        folder = Path(snapshot_download(repository, allow_patterns=list(COMPANIONS), ignore_patterns=["*/*"]))
        commit = folder.name
        for weights in WEIGHTS:
            index = folder / f"{weights}.index.json"
            if index.is_file():
                for shard in sorted(set(read_json(index).get("weight_map", {}).values())):
                    hf_hub_download(repository, shard, revision=commit)
                return folder
            try:
                hf_hub_download(repository, weights, revision=commit)
                return folder
            except EntryNotFoundError:
                continue
    except (OSError, ValueError, EntryNotFoundError) as error:
        if offline:
            raise ValueError(
                f"{repository} is neither a folder nor a GGUF file, and as a hub id it is not in the local cache while "
                "the hub is offline (HF_HUB_OFFLINE); check the path, or download it first"
            ) from None
        raise ValueError(
            f"{repository} is neither a folder nor a GGUF file, and the hub does not give it ({one_line(error)}); check the "
            "name and your connection"
        ) from None
    where = "in the local cache, and the hub is offline (HF_HUB_OFFLINE)" if offline else "on the hub"
    raise ValueError(f"{repository} has no weights ({' or '.join(WEIGHTS)}) {where}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, or ValueError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is not valid JSON; download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; download it again")
    return content


def read_config(folder: Path, model_types: Collection[str] | None) -> PretrainedConfig:
    """The config in `folder`, or ValueError if it is not one we can use."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter (adapter_config.json); merge it into its base model and convert that")
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; give the folder of a transformers checkpoint")
    content = read_json(path)
    refuse_other_architecture(content.get("model_type"), model_types, path)
    if quantization := content.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else "an unknown method"
        raise ValueError(f"{folder} is quantized ({method}); convert the model it was made from")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {one_line(error.__cause__ or error)}") from None


def read_gguf_config(path: Path, model_types: Collection[str] | None) -> PretrainedConfig:
    """The config inside a GGUF file, or ValueError."""
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from None
    refuse_other_architecture(config.model_type, model_types, path)
    return config


def refuse_other_architecture(model_type: str | None, model_types: Collection[str] | None, where: Path) -> None:
    """Raise ValueError unless `model_type` is one of `model_types`, or these are None."""
    if model_types is not None and model_type not in model_types:
        raise ValueError(
            f"{where} says model_type {model_type!r}, which is not supported; choose from {', '.join(model_types)}"
        )


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """
    The source's tokenizer.

    Raises:
        ValueError: if it is missing, unreadable, or has more entries than the model has embedding rows.
    """
    if not source.gguf and not any((source.folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{source.folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); save it there first")
    try:
        arguments = {"gguf_file": source.gguf.name} if source.gguf else {}
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False, **arguments)
        entries = max(tokenizer.get_vocab().values(), default=-1) + 1
    except Exception as error:
        raise ValueError(f"the tokenizer of {source.name} cannot be read: {one_line(error)}") from None
    if entries > source.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {source.name} has {entries} entries, but the model has {source.config.vocab_size} embedding "
            "rows; resize the model's embeddings or remove the added tokens"
        )
    return tokenizer

"""Files of a checkpoint by kind: weights and their companions."""

import shutil
from collections.abc import Collection
from pathlib import Path

# files whose hashes say from which weights a checkpoint was made
SOURCE_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
WEIGHT_SUFFIXES = {*SOURCE_WEIGHT_SUFFIXES, ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx"}


CHAT_TEMPLATES = "additional_chat_templates"  # the folder in which transformers keeps all chat templates but the first


def copy_companions(source: Path, folder: Path, leave_out: Collection[str] = ()) -> None:
    """Copy what is neither weights nor their index, nor named in `leave_out`; of sub-folders, that of chat templates alone."""
    for path in sorted(source.iterdir()):
        weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name not in leave_out:
            shutil.copyfile(path, folder / path.name)
        elif path.is_dir() and path.name == CHAT_TEMPLATES:
            shutil.copytree(path, folder / path.name)

"""Files of a checkpoint by kind: weights and their companions."""

from pathlib import Path

# files whose hashes say from which weights a checkpoint was made
SOURCE_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
WEIGHT_SUFFIXES = {*SOURCE_WEIGHT_SUFFIXES, ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx"}


def companions(folder: Path) -> list[Path]:
    """Files of a folder that are neither weights nor their index; sub-folders are left out."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [path for path in files if path.suffix not in WEIGHT_SUFFIXES and not path.name.endswith(".index.json")]

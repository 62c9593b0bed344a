"""What lies beside a checkpoint's weights."""

from pathlib import Path

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx"}


def companions(folder: Path) -> list[Path]:
    """Files of a checkpoint's folder that hold no weights, nor say in which files they are; subfolders are left out."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [path for path in files if path.suffix not in WEIGHT_SUFFIXES and not path.name.endswith(".index.json")]

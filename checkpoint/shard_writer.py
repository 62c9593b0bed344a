"""Writes weights as safetensors shards, holding one shard at a time."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARD_BYTES = 4 << 30


class ShardWriter:
    """
    Collects tensors and writes them into `folder`: as `model.safetensors` if one shard suffices, else as
    `model-00001-of-0000N.safetensors` and so on, with `model.safetensors.index.json`; `stem` in place of model.
    """

    def __init__(self, folder: Path, stem: str = "model"):
        self.folder, self.stem = folder, stem
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = self.total_bytes = 0
        self.shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self.pending and self.pending_bytes + tensor.nbytes > SHARD_BYTES:
            self.cut()
        self.pending[name] = tensor.contiguous()
        self.pending_bytes += tensor.nbytes

    def cut(self) -> None:
        """End the shard: write what is pending."""
        if not self.pending:
            return
        self.shards.append(list(self.pending))
        save_file(self.pending, self.draft(len(self.shards)), metadata={"format": "pt"})  # transformers asks for the format
        self.total_bytes += self.pending_bytes
        self.pending, self.pending_bytes = {}, 0

    def draft(self, number: int) -> Path:
        return self.folder / f"shard-{number}.partial"

    def finish(self) -> list[Path]:
        """Write the last shard and the index; returns the shards' final paths."""
        self.cut()
        total = len(self.shards)
        if total == 1:
            paths = [self.folder / f"{self.stem}.safetensors"]
        else:
            paths = [self.folder / f"{self.stem}-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)]
            weight_map = {name: path.name for path, names in zip(paths, self.shards, strict=True) for name in names}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            path = self.folder / f"{self.stem}.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for number, path in enumerate(paths, start=1):
            self.draft(number).rename(path)
        return paths

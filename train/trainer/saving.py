"""The content of a training loop's checkpoints, with DeepSpeed or without, and who may resume from them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .checkpoints import Checkpoints, read_manifest
from .distributed import barrier, gather, is_main, world_size
from .metrics import StageMetrics

WEIGHTS = "trained.safetensors"
SCHEDULE = "scheduler.pt"
METRICS = "tally.json"


class CheckpointWriter:
    """
    Writes checkpoints that hold what trains and no more, and that appear only when all processes have written their parts.

    Args:
        checkpoints: their folders.
        model: the model that trains.
        deepspeed: DeepSpeed's settings, or None.

    Attributes:
        partial: the folder to write into at the moment; None between checkpoints.
    """

    def __init__(self, checkpoints: Checkpoints, model: torch.nn.Module, deepspeed: dict | None):
        self.checkpoints = checkpoints
        self.model = model
        self.deepspeed = deepspeed
        self.partial: Path | None = None

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that train, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def weights_are_finite(self) -> bool:
        """Return whether all weights that train are finite, on all processes."""
        # ZeRO-3 leaves each process a part of a parameter, `ds_tensor`
        finite = all(bool(torch.isfinite(getattr(p, "ds_tensor", p)).all()) for p in self.trained().values())
        return all(gather(finite))

    @contextmanager
    def writing(self, step: int, metrics: StageMetrics) -> Iterator[None]:
        """Set `partial` inside the block, in which all processes write; the checkpoint of `step` appears at its end."""
        self.partial = self.checkpoints.partial(step)
        try:
            yield
        finally:
            self.partial = None
        if is_main():
            file = self.checkpoints.partial(step) / f"checkpoint-{step}" / METRICS
            file.write_text(json.dumps(metrics.state()), encoding="utf-8")
        barrier()
        if is_main():
            record = metrics.record.to_json()
            self.checkpoints.commit(
                step, writer(self.deepspeed) | {key: record.get(key) for key in ("dtype", "source", "text")}
            )
        barrier()

    def save_weights(self, folder: Path) -> None:
        """Write what trains; all else is in the checkpoint that the stage started from. DeepSpeed writes files of its own."""
        if self.deepspeed is None and is_main():
            folder.mkdir(parents=True, exist_ok=True)
            weights = {name: parameter.detach().cpu().contiguous() for name, parameter in self.trained().items()}
            save_file(weights, folder / WEIGHTS)

    def load_weights(self, checkpoint: Path) -> None:
        """Copy the weights of a checkpoint into the model; ValueError if other parameters train now."""
        saved = load_file(checkpoint / WEIGHTS)
        trained = self.trained()
        if saved.keys() != trained.keys():
            raise ValueError(f"{checkpoint} holds other weights than those that train now; delete it")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])


def writer(deepspeed: dict | None) -> dict:
    """The entries of the manifest on the processes that write a checkpoint."""
    zero = (deepspeed or {}).get("zero_optimization", {})
    offload = any(zero.get(key, {}).get("device", "none") != "none" for key in ("offload_optimizer", "offload_param"))
    name = "PyTorch" if deepspeed is None else f"DeepSpeed ZeRO-{zero.get('stage', 0)}{' with offload' if offload else ''}"
    return {"written_by": name, "world_size": world_size()}


def refuse_other_writer(checkpoint: Path, deepspeed: dict | None) -> None:
    """Raise ValueError unless this run can resume from `checkpoint`, whose parts may fit one number of processes only."""
    there = read_manifest(checkpoint)
    here = writer(deepspeed)
    any_number = here["written_by"] in ("PyTorch", "DeepSpeed ZeRO-0")  # every process holds the whole optimizer
    if there["written_by"] != here["written_by"] or (there["world_size"] != here["world_size"] and not any_number):
        raise ValueError(
            f"{checkpoint} was written by {there['world_size']} processes of {there['written_by']} and cannot be resumed by "
            f"{here['world_size']} of {here['written_by']}; run it as before, or delete {checkpoint.parent} to start again"
        )

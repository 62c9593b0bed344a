"""The part of the training loop that writes and reads checkpoints, with DeepSpeed or without."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

from .checkpoints import Checkpoints, read_manifest
from .distributed import barrier, gather, is_main, world_size
from .metrics import Tally

WEIGHTS, SCHEDULE, TALLY = "trained.safetensors", "scheduler.pt", "tally.json"


class SavingTrainer(Trainer):
    """A Trainer whose checkpoints hold what trains and no more, and appear only when all processes have written them."""

    checkpoints: Checkpoints
    tally: Tally
    save_folder: Path | None = None  # while a checkpoint is written

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that train, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def not_finite(self, what: str) -> str:
        raise NotImplementedError

    def _get_output_dir(self, trial=None) -> str:
        return str(self.save_folder or self.args.output_dir)

    def _save_checkpoint(self, model, trial=None) -> None:
        # ZeRO-3 leaves each process a part of a parameter, `ds_tensor`
        finite = all(bool(torch.isfinite(getattr(p, "ds_tensor", p)).all()) for p in self.trained().values())
        if not all(gather(finite)):
            raise ValueError(self.not_finite("a weight"))
        step = self.state.global_step
        self.save_folder = self.checkpoints.partial(step)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.save_folder = None
        if is_main():
            text = json.dumps(self.tally.state())
            (self.checkpoints.partial(step) / f"checkpoint-{step}" / TALLY).write_text(text, encoding="utf-8")
        barrier()
        if is_main():
            facts = {name: self.tally.facts.get(name) for name in ("dtype", "source", "text")}
            self.checkpoints.commit(step, writer(self.args.deepspeed) | facts)
        barrier()

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        """Write what trains; all else is in the checkpoint that the stage started from. DeepSpeed writes files of its own."""
        if not self.is_deepspeed_enabled and is_main():
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file({name: p.detach().cpu().contiguous() for name, p in self.trained().items()}, Path(output_dir) / WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if is_main():
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULE)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        resumed = None if self.is_deepspeed_enabled else resume_from_checkpoint
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resumed)
        engine = type(self.model_wrapped).__name__ == "DeepSpeedEngine"
        if engine != (self.args.deepspeed is not None) or self.args.world_size != world_size():
            raise RuntimeError(
                f"the launcher started {world_size()} processes, Trainer sees {self.args.world_size}; "
                f"DeepSpeed is {'active' if engine else 'not active'}; launch with torchrun or deepspeed"
            )
        if engine and resume_from_checkpoint is not None:
            # frozen weights are not in it
            loaded, _ = self.model_wrapped.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
            if loaded is None:
                raise ValueError(f"DeepSpeed finds nothing to load in {resume_from_checkpoint}; delete it")
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        saved, trained = load_file(Path(resume_from_checkpoint) / WEIGHTS), self.trained()
        if saved.keys() != trained.keys():
            raise ValueError(f"{resume_from_checkpoint} holds other weights than those that train now; delete it")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])


def writer(deepspeed: dict | None) -> dict:
    """What the manifest says of the processes that wrote a checkpoint."""
    zero = (deepspeed or {}).get("zero_optimization", {})
    offload = any(zero.get(key, {}).get("device", "none") != "none" for key in ("offload_optimizer", "offload_param"))
    name = "PyTorch" if deepspeed is None else f"DeepSpeed ZeRO-{zero.get('stage', 0)}{' with offload' if offload else ''}"
    return {"written_by": name, "world_size": world_size()}


def refuse_other_writer(checkpoint: Path, deepspeed: dict | None) -> None:
    """Raise ValueError unless this run can go on from `checkpoint`, whose parts may fit one number of processes only."""
    there, here = read_manifest(checkpoint), writer(deepspeed)
    whole = here["written_by"] in ("PyTorch", "DeepSpeed ZeRO-0")  # every process holds the whole optimiser
    if there["written_by"] != here["written_by"] or (there["world_size"] != here["world_size"] and not whole):
        raise ValueError(
            f"{checkpoint} was written by {there['world_size']} processes of {there['written_by']} and cannot be resumed by "
            f"{here['world_size']} of {here['written_by']}; run it as before, or delete {checkpoint.parent} to start anew"
        )


def read_tally(checkpoint: Path, steps: int) -> Tally:
    return Tally.from_state(steps, json.loads((checkpoint / TALLY).read_text(encoding="utf-8")))

"""One process or many: the environment of a run, its process group, and how the processes agree with one another."""

import functools
import importlib.resources
import json
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dijiang.common.device import device_named

from ..recipe.schema import RunConfig, StageConfig

# processes wait this long while the first one converts, downloads or tokenizes
PATIENCE = timedelta(days=7)
SET_BY_RECIPE = {
    "train_batch_size": "batch_size of the stage",
    "train_micro_batch_size_per_gpu": "run.micro_batch_size",
    "gradient_accumulation_steps": "batch_size of the stage",
    "gradient_clipping": "clip of the stage",
    "optimizer": "the stage's learning rates",
    "scheduler": "schedule of the stage",
}
SIZED_BY_MODEL = {  # what `auto` stands for, from the model's hidden size
    "reduce_bucket_size": lambda size: size * size,
    "stage3_prefetch_bucket_size": lambda size: int(0.9 * size * size),
    "stage3_param_persistence_threshold": lambda size: 10 * size,
}


def rank() -> int:
    """Rank among all processes."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Rank among the processes of this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Return whether this is the process that writes, prints and converts."""
    return rank() == 0


def prepare_process(run: RunConfig) -> torch.device:
    """
    Choose this process's device, and join the process group if a launcher started several processes or DeepSpeed is used.

    Raises:
        ValueError: if the device cannot be used, or the launcher was given DeepSpeed or FSDP settings of its own.
    """
    for name in ("DEEPSPEED", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true"):
            raise ValueError(
                f"accelerate launch was configured with {name} settings of its own; launch without them and name "
                "DeepSpeed settings as run.deepspeed in the recipe"
            )
    # the recipe chooses device and precision; with the first variable set, accelerate would silently leave DeepSpeed out
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    device = choose_device(run.device)
    if run.deepspeed is not None:
        prepare_deepspeed(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    return device


def choose_device(name: str) -> torch.device:
    """
    The device that `auto`, `cpu` or `cuda` stands for in this process.

    Raises:
        ValueError: if it cannot be used here.
    """
    if name.startswith("cuda:"):
        number = name.partition(":")[2]
        raise ValueError(f"device={name!r} names one GPU; use device='cuda' and CUDA_VISIBLE_DEVICES={number}")
    device = device_named(name)
    if device.type == "cuda":
        device = torch.device("cuda", local_rank())
        try:
            torch.empty(0, device=device)
            torch.cuda.set_device(device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def prepare_deepspeed(device: torch.device) -> None:
    """Make DeepSpeed ready for use without a launcher and without a compiler; ValueError if it is not installed."""
    try:
        import deepspeed
    except ImportError:
        raise ValueError("run.deepspeed needs the package deepspeed; pip install 'dijiang[train]'") from None
    chosen = deepspeed.accelerator.get_accelerator().device_name()
    if chosen != device.type:
        raise ValueError(f"run.device is {device.type}, but DeepSpeed would use {chosen}; set DS_ACCELERATOR={device.type}")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed calls old names
    # DeepSpeed counts no micro-batches itself, and accelerate would mention that in every step
    logging.getLogger("accelerate.accelerator").addFilter(lambda record: "accumulation steps mismatch" not in str(record.msg))
    if device.type == "cpu" and "deepspeed_shm_comm" in getattr(deepspeed.ops, "__compatible_ops__", {}):
        # this faster all-reduce between CPU processes would be compiled for minutes; gloo does the same
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:  # without a launcher DeepSpeed would ask MPI
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def forget_deepspeed() -> None:
    """Undo what Trainer did to this process for DeepSpeed, or models would be loaded in parts from now on."""
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def deepspeed_settings(stage: StageConfig, run: RunConfig, hidden_size: int) -> dict | None:
    """
    DeepSpeed's JSON for one stage: the file that run.deepspeed names, with everything in it that the recipe sets. None without
    run.deepspeed.

    Raises:
        ValueError: if there is no such file, it is not JSON, or it sets what the recipe sets.
    """
    name = run.deepspeed
    if name is None:
        return None
    bundled = importlib.resources.files("dijiang.configs") / "deepspeed"
    path = bundled / f"{name}.json" if (bundled / f"{name}.json").is_file() else Path(name)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        names = ", ".join(sorted(file.name.removesuffix(".json") for file in bundled.iterdir() if file.name.endswith(".json")))
        raise ValueError(f"deepspeed={name!r} is neither a file nor one of {names}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object")
    for key, setter in SET_BY_RECIPE.items():
        if settings.get(key, "auto") != "auto":
            raise ValueError(f"{path} sets {key}, which {setter} in the recipe decides; remove it there")
    for key in ("bf16", "fp16"):
        if settings.pop(key, {}).get("enabled", False) not in (False, "auto"):
            raise ValueError(f"{path} enables {key}; remove it there: what trains is float32, run.dtype sets the rest")
    zero = settings.setdefault("zero_optimization", {"stage": 0})
    for key, size in SIZED_BY_MODEL.items():
        if zero.get(key) == "auto":
            zero[key] = size(hidden_size)
    settings.pop("train_batch_size", None)
    return settings | {
        "train_micro_batch_size_per_gpu": micro_batch(stage, run),
        "gradient_accumulation_steps": accumulation(stage, run),
        "gradient_clipping": float(stage.clip),
    }


def micro_batch(stage: StageConfig, run: RunConfig) -> int:
    """The largest divisor of a process's share of the batch up to run.micro_batch_size; ValueError if shares are unequal."""
    share, rest = divmod(stage.batch_size, world_size())
    if rest:
        raise ValueError(
            f"batch_size={stage.batch_size} cannot be dealt out to {world_size()} processes; make it a multiple of "
            f"{world_size()}, or start fewer"
        )
    return max(size for size in range(1, min(share, run.micro_batch_size) + 1) if share % size == 0)


def accumulation(stage: StageConfig, run: RunConfig) -> int:
    """Micro-batches of each process in a step; ValueError as for `micro_batch`."""
    return stage.batch_size // (micro_batch(stage, run) * world_size())


def several() -> bool:
    """Return whether there are other processes to exchange values with."""
    return dist.is_initialized() and dist.get_world_size() > 1


@functools.cache
def waiting_group():
    """The group of all processes whose collectives wait for days, unlike those of training."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all processes, in place."""
    if several():
        dist.all_reduce(values)
    return values


def barrier() -> None:
    """Wait until all processes are here."""
    if several():
        dist.barrier(waiting_group())


def from_main(value):
    """The main process's value, on all of them. It must be small."""
    if not several():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=waiting_group())
    return box[0]


def gather(value) -> list:
    """Every process's value, in order of rank, on all of them. They must be small."""
    if not several():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=waiting_group())
    return values


@contextmanager
def share_errors() -> Iterator[None]:
    """
    Raise a ValueError of any process on all of them, at the end of the block, where all wait for each other. Processes must
    not communicate inside the block.
    """
    error = None
    try:
        yield
    except ValueError as raised:
        error = raised
    messages = gather(None if error is None else str(error))
    if error is not None:
        raise error
    for message in messages:
        if message is not None:
            raise ValueError(message)

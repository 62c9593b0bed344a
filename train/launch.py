"""Recovery as a command: what the command line and launchers call, with exit codes for errors."""

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from dijiang.common.errors import EXIT_ERROR, EXIT_INTERRUPTED, print_line

from .recipe.load import load_recipe


def run_recipe(recipe: str, sets: Sequence[str] = (), stage: str | None = None) -> int:
    """
    Run a recipe in this process, alone or as one of a launcher's processes, and print one line about the outcome.

    Args:
        recipe: YAML file, or the name of a bundled recipe.
        sets: `KEY=VALUE` words on top of it.
        stage: `align` or `distill`; None: all stages.

    Returns:
        The exit code: 0, 1 after an error that a user can fix, 130 if the run was interrupted.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would warn about it, wherever transformers imports it

    from .stages.run import recover, run_stage
    from .trainer.distributed import is_main

    def ended(message: BaseException | str, code: int) -> int:
        if is_main():
            print_line(message)
        return code

    try:
        settings = load_recipe(recipe, sets)
        folder = recover(settings) if stage is None else run_stage(settings, stage)
        return ended(f"wrote {folder}", 0)
    except (ValueError, OSError, SafetensorError) as error:
        return ended(error, EXIT_ERROR)
    except KeyboardInterrupt as interruption:
        return ended(str(interruption) or "interrupted; run the same command again to continue", EXIT_INTERRUPTED)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

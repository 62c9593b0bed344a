"""
`python -m dijiang.train RECIPE`: run a recipe's stages in this process, or in those of a launcher:

    deepspeed --module dijiang.train RECIPE
    torchrun --nproc-per-node 8 -m dijiang.train RECIPE
    accelerate launch -m dijiang.train RECIPE
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
from safetensors import SafetensorError

INTERRUPTED = 130


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dijiang.train", description="Recover a model's quality by a recipe.")
    parser.add_argument("recipe", help="YAML file, or the name of a bundled recipe")
    parser.add_argument("--stage", choices=["align", "distill"], help="run this one alone; default: all, in order")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="on top of the recipe, e.g. align.tokens=20000"
    )
    # launchers pass it; the environment says the same
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 after an error that a user can mend, 130 if the run was interrupted."""
    given = parse_arguments(arguments)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would warn about it, wherever transformers imports it

    from .recipe.load import load_recipe
    from .stages.run import recover, run_stage
    from .trainer.distributed import is_main

    def say(text: str) -> None:
        if is_main():
            print(text, file=sys.stderr, flush=True)

    try:
        recipe = load_recipe(given.recipe, given.set)
        folder = recover(recipe) if given.stage is None else run_stage(recipe, given.stage)
        say(f"dijiang: wrote {folder}")
    except (ValueError, OSError, SafetensorError) as error:
        say(f"dijiang: {' '.join(str(error).split())}")
        return 1
    except KeyboardInterrupt as interruption:
        say(f"dijiang: {interruption or 'interrupted; run the same command again to go on'}")
        return INTERRUPTED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())

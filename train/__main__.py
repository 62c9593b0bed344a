"""
`python -m dijiang.train RECIPE`: run a recipe's stages in this process, or in those of a launcher:

    deepspeed --module dijiang.train RECIPE
    torchrun --nproc-per-node 8 -m dijiang.train RECIPE
    accelerate launch -m dijiang.train RECIPE
"""

import argparse
import sys

from .launch import run_recipe


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The words of the command line; default: this process's."""
    parser = argparse.ArgumentParser(prog="python -m dijiang.train", description="Recover a model's quality by a recipe.")
    parser.add_argument("recipe", help="YAML file, or the name of a bundled recipe")
    parser.add_argument("--stage", choices=["align", "distill"], help="run this one alone; default: all, in order")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="on top of the recipe, e.g. align.tokens=20000"
    )
    # launchers pass it; the environment says the same
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    words = parse_arguments()
    sys.exit(run_recipe(words.recipe, words.set, words.stage))

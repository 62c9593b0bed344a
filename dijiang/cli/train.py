"""The commands that recover quality, align, distill and recover, and estimate, which computes what that costs."""

import importlib.resources
import importlib.util
from typing import Annotated

import typer

from dijiang.common.errors import AlreadyReported


def bundled_names() -> str:
    """Names of the bundled recipes, without importing torch. The demo's is of no use outside the demo."""
    files = (importlib.resources.files("dijiang.configs") / "recipes").iterdir()
    return ", ".join(sorted(file.name.removesuffix(".yaml") for file in files if file.name != "demo.yaml"))


RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help=f"YAML file, or a bundled recipe: {bundled_names()}.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="On top of the recipe, e.g. distill.tokens=100000. Repeatable."),
]


def align(recipe: RecipeName, sets: Sets = None) -> None:
    """
    Fit the linear layers to the teacher's attention: the first stage of recover.

    Converts the source first if that has not been done; leaves `align/model` in the recipe's output folder.

    Example: dijiang align smollm2-135m --set align.tokens=20000 --set output=runs/short

    The same recipe runs on many GPUs with `deepspeed --module dijiang.train RECIPE --stage align`, or with `torchrun
    --nproc-per-node 8 -m dijiang.train RECIPE --stage align`.
    """
    train("align", recipe, sets)


def distill(recipe: RecipeName, sets: Sets = None) -> None:
    """
    Train the student on the teacher's predictions: the second stage of recover.

    Starts from `align/model`, or from the converted model if the recipe has no section align; leaves `distill/model`.

    Example: dijiang distill smollm2-135m --set distill.learning_rate=1e-4

    The same recipe runs on many GPUs with `deepspeed --module dijiang.train RECIPE --stage distill`, or with `torchrun
    --nproc-per-node 8 -m dijiang.train RECIPE --stage distill`.
    """
    train("distill", recipe, sets)


def recover(recipe: RecipeName, sets: Sets = None) -> None:
    """
    Convert a recipe's source and run all of its stages.

    Run an interrupted command again to continue.

    Leaves the model of each stage in the recipe's output folder, the last one as `distill/model`.

    Example: dijiang recover smollm2-135m --set source=my-model --set output=runs/mine

    The same recipe runs on many GPUs with `deepspeed --module dijiang.train RECIPE`, or with `torchrun --nproc-per-node 8 -m
    dijiang.train RECIPE`.
    """
    train(None, recipe, sets)


def train(stage: str | None, recipe: str, sets: list[str] | None) -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError("training needs packages that are missing; run: pip install 'dijiang[train]'")
    from dijiang.train.launch import run_recipe

    if code := run_recipe(recipe, sets or [], stage):
        raise AlreadyReported(code)


def estimate(
    recipe: RecipeName,
    gpu: Annotated[str, typer.Option(help="Kind of device, such as h100, a100-80gb, rtx4090 or cpu.")] = "h100",
    gpus: Annotated[int, typer.Option(help="How many of them.")] = 1,
    sets: Sets = None,
) -> None:
    """
    Compute the hours and the memory that a recipe takes; no weights are read.

    Example: dijiang estimate llama2-7b --gpu h100 --gpus 8

    The same recipe then runs on many GPUs with `deepspeed --module dijiang.train RECIPE`, or with `torchrun`.
    """
    from dijiang.train import load_recipe
    from dijiang.train.estimate.estimate import estimate as estimated
    from dijiang.train.estimate.estimate import render

    typer.echo(render(estimated(load_recipe(recipe, sets or []), gpu=gpu, gpus=gpus)))

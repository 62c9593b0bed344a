"""
Recovery of SmolLM2-135M-Instruct by a recipe of this package, in as many tokens as the time limit allows.

    python scripts/gpu/steps/recovery.py --data DATA --results RESULTS [--recipe RECIPE] [--set KEY=VALUE ...] [--seconds 300]

The teacher is the GGUF file in DATA/weights, dequantised once into DATA/runs/teacher; the text is DATA/corpus, tokenised
already. A few real training steps tell how fast each way of computing them is (`training_step`), and the fastest sets the
budget of tokens, so that the learning rate's schedule ends with the time. Everything else is what `dijiang recover` does: the
recipe, its stages, its checkpoints. Perplexity and recall of teacher, converted and recovered model come last; what a killed
run leaves is in the JSON too, and a further call goes on from its newest checkpoint.
"""

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

import torch
from recovery_data import Inputs, made_up_inputs, prepare_inputs
from recovery_quality import Judge
from recovery_speed import Speed, checkpoint_seconds, note
from recovery_watch import Watch

from common import Record, arguments, card_rates, device_of, one_line
from dijiang.common.device import fastest_dtype
from dijiang.modeling import window_attention_flex as flex_window
from dijiang.modeling.linear_attention import prefer_backend
from dijiang.train import Recipe, load_recipe, run_stage
from dijiang.train.stages.job_folder import StageFolder
from dijiang.train.trainer.checkpoints import Checkpoints

STEPS = {"smollm2-135m-linear": "recovery_linear", "smollm2-135m": "recovery_window"}
# on top of the recipes, which are made for two processor cores and one sequence per step
SETTINGS = {
    "smollm2-135m-linear": (
        "align.attention_learning_rate=1e-3",
        "distill.block_size=1024",
        "distill.batch_size=48",
        "distill.attention_learning_rate=1.5e-3",
        "distill.learning_rate=1e-3",
    ),
    "smollm2-135m": (
        "align.block_size=1024",
        "align.start_block_size=null",
        "distill.block_size=2048",
        "distill.start_block_size=null",
        "distill.batch_size=8",
        "distill.attention_learning_rate=6e-4",
        "distill.learning_rate=6e-4",
    ),
}
SHARED = (
    "align.batch_size=8",
    "align.calibrate_blocks=2",
    "distill.batch_size=16",
    "distill.final_share=0.02",
    "distill.chunk_tokens=8192",
    "data.respect_documents=false",  # as in all recorded runs; it also lets torch.compile know the shapes
    "data.streaming=false",
    "run.report_to=[]",
)
SMALL = (
    *("align.block_size=64", "align.position_range=128", "align.batch_size=2", "align.calibrate_blocks=1"),
    *("distill.block_size=64", "distill.position_range=128", "distill.batch_size=4", "distill.chunk_tokens=64"),
)
ALIGN_SECONDS, ALIGN_TOKENS = 15.0, 4_000_000
FIRST_GUESS = 1_000_000  # tokens, until the speed is known
LAST_SECONDS = 14.0  # of a run: the evaluation at the end
SLACK = 0.93  # share of the measured speed that is counted on
SAVE_EVERY_SECONDS, COSTLY_SAVE = 60.0, 4.0
QUICK_TOKENS = 49_152  # held out, measured with every checkpoint


class Recovery:
    """One run of the step."""

    def __init__(self, options, own, record: Record, device: torch.device):
        self.options, self.own, self.record, self.device = options, own, record, device
        self.small, self.data = options.small, record.data
        self.dtype = torch.float32 if self.small else torch.bfloat16 if device.type == "cuda" else fastest_dtype(device)
        self.last_seconds = 8.0 if self.small else min(LAST_SECONDS, 0.15 * options.seconds)

    def run(self, inputs: Inputs) -> None:
        self.inputs = inputs
        for key in ("error", "stopped", "fell_back", "judged_checkpoint"):  # of an earlier call
            self.data.pop(key, None)
        self.data |= {"recipe": self.own.recipe, "corpus": inputs.facts, "dtype": str(self.dtype).removeprefix("torch.")}
        self.data["card"] = self.data.get("card") or card_rates(self.device, self.small)
        self.judge = Judge(inputs, self.device, self.dtype, self.record, self.small)
        recipe = self.recipe()
        self.phase("teacher's quality")
        self.judge.measure("teacher", str(inputs.teacher))
        recipe = self.align(recipe)
        self.phase("baseline's quality")
        self.judge.measure("baseline", str(Path(recipe.output) / "converted"), recall=False)
        recipe = self.distill(recipe)
        self.phase("student's quality")
        folder = StageFolder(recipe, "distill")
        self.data["finished_training"] = folder.model.exists()
        if folder.model.exists():
            self.judge.measure("student", str(folder.model))
        elif (newest := Checkpoints(folder.path / "checkpoints", 2).newest()) is not None:
            self.judge.measure("student", str(folder.source), weights=newest / "trained.safetensors")
            self.data["judged_checkpoint"] = newest.name
        self.phase("done")
        measured = self.data.get("quality", {}).get("student", {}).get("measured", False)
        self.data["complete"] = self.data["finished_training"] and measured
        self.record.save()

    def phase(self, name: str) -> None:
        """Note what comes now, and when."""
        print(f"recovery: {name}, {self.record.left():.0f} s left", flush=True)
        self.data.setdefault("phases", []).append({"phase": name, "left_s": round(self.record.left(), 1)})
        self.record.save()

    def recipe(self) -> Recipe:
        """The recipe with this machine's paths and settings, its budgets not yet known."""
        sets = [*SHARED, *SETTINGS.get(self.own.recipe, ()), *(SMALL if self.small else ())]
        if self.small and self.own.recipe == "smollm2-135m":
            sets.append("convert.settings.attention_window=16")
        sets += [f"source={self.inputs.teacher}", f"output={self.inputs.runs / self.record.path.stem}"]
        sets += [f"align.tokens={FIRST_GUESS}", f"distill.tokens={FIRST_GUESS}", *self.own.set]
        last = {word.partition("=")[0]: word for word in sets}  # the user's words come last and win
        recipe = load_recipe(self.own.recipe, list(last.values()))
        data = dataclasses.replace(
            recipe.data,
            train=self.inputs.train,
            held_out=self.inputs.held,
            held_out_tokens=512 if self.small else QUICK_TOKENS,
            cache=str(self.inputs.runs / "tokens"),
        )
        run = dataclasses.replace(recipe.run, device=self.device.type, dtype=str(self.dtype).removeprefix("torch."))
        return dataclasses.replace(recipe, data=data, run=run)

    def stored(self, recipe: Recipe, stage: str) -> Recipe | None:
        """The recipe that an earlier call began a stage with."""
        file = StageFolder(recipe, stage).recipe_file
        return load_recipe(file, stored=True) if file.is_file() else None

    def align(self, recipe: Recipe) -> Recipe:
        """Run the first stage, on as many tokens as go into `ALIGN_SECONDS`; returns the recipe with its budget."""
        if (stored := self.stored(recipe, "align")) is not None:
            recipe = self.with_micro_batch(dataclasses.replace(recipe, align=stored.align), stored.run.micro_batch_size)
        else:
            self.phase("speed of align")
            StageFolder(recipe, "align").path.mkdir(parents=True, exist_ok=True)
            StageFolder(recipe, "align").prepare(False)
            StageFolder(recipe, "align").recipe_file.unlink()
            speed = Speed(recipe, "align", self.inputs.tokenizer, self.device, self.dtype)
            found = speed.measure({"name": "eager, torch"}, steps=2)
            speed.close()
            note(self.data.setdefault("training_step", []), found)
            step = recipe.align.batch_size * recipe.align.block_size
            seconds = 1.0 if self.small else min(ALIGN_SECONDS, 0.06 * self.options.seconds)
            tokens = int(min(found["tokens_per_s"] * seconds * SLACK, ALIGN_TOKENS)) if "tokens_per_s" in found else 50 * step
            recipe = dataclasses.replace(recipe, align=dataclasses.replace(recipe.align, tokens=max(tokens, 4 * step)))
            recipe = self.with_micro_batch(recipe, found.get("micro_batch", 1))
        self.phase("align")
        self.train(recipe, "align")
        return recipe

    def with_micro_batch(self, recipe: Recipe, micro_batch: int, **run) -> Recipe:
        return dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, micro_batch_size=micro_batch, **run))

    def distill(self, recipe: Recipe) -> Recipe:
        """Run the second stage, on as many tokens as go into the time that is left."""
        stored = self.stored(recipe, "distill")
        if stored is not None and not self.small:
            recipe, best = dataclasses.replace(stored, output=recipe.output), {}
            self.phase("distill goes on")
            seconds_to_start = 30.0
        else:
            self.phase("speed of distill")
            speed = Speed(recipe, "distill", self.inputs.tokenizer, self.device, self.dtype)
            best = speed.choose(self.data.setdefault("training_step", []), self.record, self.small, self.own.all_ways)
            seconds_to_start = speed.build_seconds + min(best.get("warmup_s", 0.0), 10.0)
            self.data["flops_per_token"] = speed.flops()
            trained = speed.trained
            speed.close()
            recipe = self.with_budget(recipe, best, seconds_to_start, trained)
        self.phase("distill")
        flex_window.use_flex = best.get("flex", False)
        with prefer_backend(best.get("backend", "torch")):
            self.train(recipe, "distill", seconds_to_start)
        flex_window.use_flex = False
        return recipe

    def with_budget(self, recipe: Recipe, best: dict, seconds_to_start: float, trained: int) -> Recipe:
        """`recipe` with the fastest settings, and the tokens and checkpoints that the time allows for."""
        save = checkpoint_seconds(Path(recipe.output), 12 * trained)
        config, step = recipe.distill, recipe.distill.batch_size * recipe.distill.block_size
        seconds = self.record.left() - self.last_seconds - seconds_to_start
        saves = 1 if save > COSTLY_SAVE or self.small else max(1, int(seconds / SAVE_EVERY_SECONDS))
        quick = 2.0  # seconds of a quick look at held-out text
        seconds -= saves * (save + quick) + save + 2.0
        rate = best.get("tokens_per_s", 1e4) * SLACK
        tokens = 12 * step if self.small else max(int(seconds * rate), 20 * step)
        if self.own.tokens:
            tokens = self.own.tokens
        steps = tokens // step
        every = max(1, -(-steps // saves))
        self.data |= {
            "checkpoint_s": round(save, 2),
            "planned": {"tokens": tokens, "steps": steps, "seconds": round(seconds, 1)},
        }
        recipe = self.with_micro_batch(
            recipe,
            best.get("micro_batch", 1),
            compile=best.get("compile", False),
            save_every=every,
            evaluate_every=every,
            log_every=max(1, steps // 200),
        )
        return dataclasses.replace(recipe, distill=dataclasses.replace(config, tokens=tokens))

    def train(self, recipe: Recipe, stage: str, seconds_to_start: float = 0.0) -> None:
        """
        `run_stage`, with its measures put into the JSON as they come. What fails is tried again from the newest checkpoint
        with less: half the micro-batch where the memory ran out, else without torch.compile.
        """
        for _ in range(4):
            minutes = (self.record.left() - self.last_seconds - seconds_to_start) / 60
            run = dataclasses.replace(recipe.run, max_minutes=max(minutes, 0.01) if stage == "distill" else 0.0)
            recipe = dataclasses.replace(recipe, run=run)
            self.data.setdefault("settings", {})[stage] = {
                stage: dataclasses.asdict(getattr(recipe, stage)),
                "run": dataclasses.asdict(run),
                "convert": dataclasses.asdict(recipe.convert),
            }
            watch = Watch(self.record, StageFolder(recipe, stage).path / "metrics.jsonl", stage)
            try:
                with watch:
                    run_stage(recipe, stage, progress=not self.small)
                return
            except KeyboardInterrupt as stopped:
                self.data["stopped"] = str(stopped)
                return
            except torch.OutOfMemoryError:
                if run.micro_batch_size == 1:
                    raise
                recipe = self.with_micro_batch(recipe, run.micro_batch_size // 2)
                self.data.setdefault("fell_back", []).append(f"{stage}: micro-batch {recipe.run.micro_batch_size}")
            except Exception as error:
                if not run.compile:
                    raise
                recipe = self.with_micro_batch(recipe, run.micro_batch_size, compile=False)
                self.data.setdefault("fell_back", []).append(f"{stage}: without torch.compile after {one_line(error)}")
            finally:
                self.note_speed(stage)
            torch.cuda.empty_cache()

    def note_speed(self, stage: str) -> None:
        """What the training so far says of tokens and FLOPs per second."""
        found = self.data.get("training", {}).get(stage, {})
        if stage != "distill" or not found.get("tokens_per_s"):
            return
        flops = sum(self.data.get("flops_per_token", {}).values())
        peak = self.data["card"]["product_gflops"]["bfloat16"] * 1e9
        self.data |= {
            "tokens": found["tokens"],
            "tokens_per_s": found["tokens_per_s"],
            "share_of_measured_peak": flops * found["tokens_per_s"] / peak,
        }
        self.record.save()


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--recipe", default="smollm2-135m-linear", help="a bundled recipe or a file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the recipe")
    parser.add_argument("--tokens", type=int, help="budget of the second stage, in place of what the time allows")
    parser.add_argument("--fresh", action="store_true", help="delete what an earlier call began")
    parser.add_argument("--all-ways", action="store_true", help="time fla and FlexAttention too, a minute more")
    words = sys.argv[1:]
    own, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    options = arguments(f"{__doc__}\n\n{parser.format_help()}")
    sys.argv[1:] = words
    options.results.mkdir(parents=True, exist_ok=True)
    device = device_of(options.small)
    step = STEPS.get(own.recipe, f"recovery_{Path(own.recipe).stem}")
    record = Record(step, options)
    record.data["command"] = record.data["command"].replace(f"steps/{step}.py", "steps/recovery.py")
    run = Recovery(options, own, record, device)
    flex_window.use_flex = False  # nothing is compiled unasked, and evaluation has many lengths
    try:
        with prefer_backend("torch"), tempfile.TemporaryDirectory() as folder:
            if options.small:
                run.run(made_up_inputs(Path(folder)))
            else:
                run.run(prepare_inputs(options.data, record, fresh=step if own.fresh else None))
    except (Exception, KeyboardInterrupt) as error:
        record.data["error"] = one_line(error)
        record.save()
        raise


if __name__ == "__main__":
    main()

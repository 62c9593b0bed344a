"""
Recovery of SmolLM2-135M-Instruct by a recipe of this package, in as many tokens as the time limit allows.

    python scripts/gpu/steps/recovery.py --data DATA --results RESULTS [--recipe RECIPE] [--set KEY=VALUE ...] [--seconds 300]

The teacher is the GGUF file in DATA/weights, dequantized once into DATA/runs/teacher; the text is DATA/corpus, already
tokenized. A few real training steps show how fast each way of computing them is (`training_step`), and the fastest determines
the budget of tokens, so that the learning rate's schedule ends with the time. Everything else is that of `dijiang recover`:
recipe, stages, checkpoints. Perplexity and recall of teacher, converted and recovered model come last. The JSON also holds
what a killed run has measured, and another call continues from its newest checkpoint.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from recovery_data import Inputs, prepare_inputs, synthetic_inputs
from recovery_quality import Judge
from recovery_speed import Speed, checkpoint_seconds, note
from shared import Record, arguments, card_rates, describe_error, device_of

from dijiang.common.device import dtype_name, fastest_dtype
from dijiang.modeling import window_attention_flex as flex_window
from dijiang.modeling.linear_attention import prefer_backend
from dijiang.train import Recipe, load_recipe, run_stage
from dijiang.train.stages.job_folder import StageFolder
from dijiang.train.trainer.checkpoints import Checkpoints

STEPS = {"smollm2-135m-linear": "recovery_linear", "smollm2-135m": "recovery_window"}
# on top of the recipes, which are meant for two processor cores and one sequence per step
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
    "data.respect_documents=false",  # as in all recorded runs; it also gives torch.compile fixed shapes
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
SLACK = 0.93  # share of the measured speed that is relied on
SAVE_EVERY_SECONDS, COSTLY_SAVE = 60.0, 4.0
QUICK_TOKENS = 49_152  # held out, measured with every checkpoint
READ_EVERY_SECONDS = 5.0
SHOWN_METRICS = ("step", "tokens", "loss", "kl", "ce", "grad_norm", "tokens_per_second")


@contextlib.contextmanager
def watched(record: Record, path: Path, stage: str) -> Iterator[None]:
    """
    Copy a stage's metrics.jsonl every few seconds, and once more at the end, into the record's entry `training`, so that a
    killed run leaves it.
    """
    began = time.monotonic()
    ended = threading.Event()

    def copy() -> None:
        lines = []
        with contextlib.suppress(OSError, ValueError):  # the file may be missing, or its last line half-written
            for line in path.read_text(encoding="utf-8").splitlines():
                lines.append(json.loads(line))
        curve = [{key: line[key] for key in SHOWN_METRICS if key in line} for line in lines if "loss" in line]
        held_out = [
            {
                "tokens": line["tokens"],
                "perplexity": line["eval_perplexity"],
                "teacher_perplexity": line.get("eval_teacher_perplexity"),
            }
            for line in lines
            if "eval_perplexity" in line
        ]
        training = {"seconds": round(time.monotonic() - began, 1), "curve": curve, "held_out": held_out}
        if curve:
            speeds = [line["tokens_per_second"] for line in curve[1:] or curve]
            training |= {"tokens": curve[-1]["tokens"], "tokens_per_s": statistics.median(speeds)}
        record.data.setdefault("training", {})[stage] = training
        record.save()

    def follow() -> None:
        while not ended.wait(READ_EVERY_SECONDS):
            copy()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        copy()


class Recovery:
    """One run of the step."""

    def __init__(self, options: argparse.Namespace, record: Record, device: torch.device):
        self.options = options
        self.record = record
        self.device = device
        self.small = options.small
        self.data = record.data
        self.dtype = torch.float32 if self.small else torch.bfloat16 if device.type == "cuda" else fastest_dtype(device)
        self.last_seconds = 8.0 if self.small else min(LAST_SECONDS, 0.15 * options.seconds)

    def run(self, inputs: Inputs) -> None:
        self.inputs = inputs
        for key in ("error", "stopped", "fell_back", "judged_checkpoint"):  # of an earlier call
            self.data.pop(key, None)
        self.data |= {"recipe": self.options.recipe, "corpus": inputs.facts, "dtype": dtype_name(self.dtype)}
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
        """Record the phase that begins, and the time left."""
        print(f"recovery: {name}, {self.record.left():.0f} s left", flush=True)
        self.data.setdefault("phases", []).append({"phase": name, "left_s": round(self.record.left(), 1)})
        self.record.save()

    def recipe(self) -> Recipe:
        """The recipe with this machine's paths and settings and preliminary budgets."""
        sets = [*SHARED, *SETTINGS.get(self.options.recipe, ()), *(SMALL if self.small else ())]
        if self.small and self.options.recipe == "smollm2-135m":
            sets.append("convert.settings.attention_window=16")
        sets += [f"source={self.inputs.teacher}", f"output={self.inputs.runs / self.record.path.stem}"]
        sets += [f"align.tokens={FIRST_GUESS}", f"distill.tokens={FIRST_GUESS}", *self.options.set]
        words = {word.partition("=")[0]: word for word in sets}  # the user's come last and win
        recipe = load_recipe(self.options.recipe, list(words.values()))
        data = dataclasses.replace(
            recipe.data,
            train=self.inputs.train,
            held_out=self.inputs.held,
            held_out_tokens=512 if self.small else QUICK_TOKENS,
            cache=str(self.inputs.runs / "tokens"),
        )
        run = dataclasses.replace(recipe.run, device=self.device.type, dtype=dtype_name(self.dtype))
        return dataclasses.replace(recipe, data=data, run=run)

    def stored(self, recipe: Recipe, stage: str) -> Recipe | None:
        """The recipe that an earlier call began a stage with."""
        file = StageFolder(recipe, stage).recipe_file
        return load_recipe(file, stored=True) if file.is_file() else None

    def align(self, recipe: Recipe) -> Recipe:
        """Run the first stage on the tokens that `ALIGN_SECONDS` allow, and return the recipe with that budget."""
        if (stored := self.stored(recipe, "align")) is not None:
            recipe = self.with_micro_batch(dataclasses.replace(recipe, align=stored.align), stored.run.micro_batch_size)
        else:
            self.phase("speed of align")
            StageFolder(recipe, "align").path.mkdir(parents=True, exist_ok=True)
            StageFolder(recipe, "align").prepare(False)
            StageFolder(recipe, "align").recipe_file.unlink()
            speed = Speed(recipe, "align", self.inputs.tokenizer, self.device, self.dtype)
            eager = speed.measure({"name": "eager, torch"}, steps=2)
            speed.close()
            note(self.data.setdefault("training_step", []), eager)
            step = recipe.align.batch_size * recipe.align.block_size
            seconds = 1.0 if self.small else min(ALIGN_SECONDS, 0.06 * self.options.seconds)
            tokens = int(min(eager["tokens_per_s"] * seconds * SLACK, ALIGN_TOKENS)) if "tokens_per_s" in eager else 50 * step
            recipe = dataclasses.replace(recipe, align=dataclasses.replace(recipe.align, tokens=max(tokens, 4 * step)))
            recipe = self.with_micro_batch(recipe, eager.get("micro_batch", 1))
        self.phase("align")
        self.train(recipe, "align")
        return recipe

    def with_micro_batch(self, recipe: Recipe, micro_batch: int, **run) -> Recipe:
        return dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, micro_batch_size=micro_batch, **run))

    def distill(self, recipe: Recipe) -> Recipe:
        """Run the second stage on the tokens that the remaining time allows, and return the recipe with that budget."""
        stored = self.stored(recipe, "distill")
        if stored is not None and not self.small:
            recipe = dataclasses.replace(stored, output=recipe.output)
            best = {}
            self.phase("distill goes on")
            seconds_to_start = 30.0
        else:
            self.phase("speed of distill")
            speed = Speed(recipe, "distill", self.inputs.tokenizer, self.device, self.dtype)
            best = speed.choose(self.data.setdefault("training_step", []), self.record, self.small, self.options.all_ways)
            seconds_to_start = speed.build_seconds + min(best.get("warmup_s", 0.0), 10.0)
            self.data["flops_per_token"] = speed.flops()
            trained = speed.trained
            speed.close()
            recipe = self.with_budget(recipe, best, seconds_to_start, trained)
        self.phase("distill")
        flex_window.kernel.enabled = best.get("flex", False)
        with prefer_backend(best.get("backend", "torch")):
            self.train(recipe, "distill", seconds_to_start)
        flex_window.kernel.enabled = False
        return recipe

    def with_budget(self, recipe: Recipe, best: dict, seconds_to_start: float, trained: int) -> Recipe:
        """`recipe` with the fastest settings, and the tokens and checkpoints that the time allows."""
        save = checkpoint_seconds(Path(recipe.output), 12 * trained)
        step = recipe.distill.batch_size * recipe.distill.block_size
        seconds = self.record.left() - self.last_seconds - seconds_to_start
        saves = 1 if save > COSTLY_SAVE or self.small else max(1, int(seconds / SAVE_EVERY_SECONDS))
        quick = 2.0  # seconds to measure held-out text
        seconds -= saves * (save + quick) + save + 2.0
        rate = best.get("tokens_per_s", 1e4) * SLACK
        tokens = 12 * step if self.small else max(int(seconds * rate), 20 * step)
        if self.options.tokens:
            tokens = self.options.tokens
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
        return dataclasses.replace(recipe, distill=dataclasses.replace(recipe.distill, tokens=tokens))

    def train(self, recipe: Recipe, stage: str, seconds_to_start: float = 0.0) -> None:
        """
        Run `run_stage` while its metrics go into the JSON. After a failure it is tried again from the newest checkpoint: with
        half the micro-batch if the memory ran out, else without torch.compile.
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
            try:
                with watched(self.record, StageFolder(recipe, stage).path / "metrics.jsonl", stage):
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
                self.data.setdefault("fell_back", []).append(f"{stage}: without torch.compile after {describe_error(error)}")
            finally:
                self.note_speed(stage)
            torch.cuda.empty_cache()

    def note_speed(self, stage: str) -> None:
        """Record tokens and FLOPs per second of the training so far."""
        training = self.data.get("training", {}).get(stage, {})
        if stage != "distill" or not training.get("tokens_per_s"):
            return
        flops = sum(self.data.get("flops_per_token", {}).values())
        peak = self.data["card"]["product_gflops"]["bfloat16"] * 1e9
        self.data |= {
            "tokens": training["tokens"],
            "tokens_per_s": training["tokens_per_s"],
            "share_of_measured_peak": flops * training["tokens_per_s"] / peak,
        }
        self.record.save()


def main() -> None:
    options = arguments(
        __doc__,
        recipe={"default": "smollm2-135m-linear", "help": "a bundled recipe or a file"},
        set={"action": "append", "default": [], "metavar": "KEY=VALUE", "help": "a key of the recipe"},
        tokens={"type": int, "help": "budget of the second stage; default: what the time allows"},
        fresh={"action": "store_true", "help": "delete the run of an earlier call"},
        all_ways={"action": "store_true", "help": "time fla and FlexAttention too, a minute more"},
    )
    options.results.mkdir(parents=True, exist_ok=True)
    device = device_of(options.small)
    step = STEPS.get(options.recipe, f"recovery_{Path(options.recipe).stem}")
    record = Record(step, options)
    record.data["command"] = record.data["command"].replace(f"steps/{step}.py", "steps/recovery.py")
    run = Recovery(options, record, device)
    flex_window.kernel.enabled = False  # it compiles, and evaluation has many lengths
    try:
        with prefer_backend("torch"), tempfile.TemporaryDirectory() as folder:
            if options.small:
                run.run(synthetic_inputs(Path(folder)))
            else:
                run.run(prepare_inputs(options.data, record, fresh=step if options.fresh else None))
    except (Exception, KeyboardInterrupt) as error:
        record.data["error"] = describe_error(error)
        record.save()
        raise


if __name__ == "__main__":
    main()

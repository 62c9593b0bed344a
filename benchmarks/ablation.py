"""
The worth of each choice of the align stage: feature map x window x decay, loss variants, closed-form start.

    python benchmarks/ablation.py --train TEXT... --held-out TEXT... [--output benchmarks/results/ablation.json]

Four of SmolLM2-135M's thirty layers become linear, the others stay softmax, so that a whole model can be judged after a short
run: every choice sees the same tokens in the same order, with the recipe's optimizer and schedule. Measured on held-out text:
the mean over the four layers of the output's relative squared error, and the model's perplexity over its teacher's. With a
window, both are measured again for the linear branch alone. The output file holds all finished choices, and an interrupted run
continues after them.
The texts of the recorded run are `ablation_*.txt` of scripts/make_recovery_text.py and dijiang/data/jargon_heldout.txt.
"""

import argparse
import time
from pathlib import Path

import torch
from measure import console, earlier_runs, machine, versions, write_json

from dijiang.bundled import packaged_model
from dijiang.common.device import fastest_dtype
from dijiang.common.text import read_tokens
from dijiang.convert import load_source
from dijiang.evaluate import linear_only, perplexity
from dijiang.modeling import DiJiangConfig, DiJiangForCausalLM
from dijiang.modeling.linear_attention_layer import linear_layers
from dijiang.train import AlignConfig
from dijiang.train.stages.align import AlignModel
from dijiang.train.stages.parameters import added_parameters
from dijiang.train.stages.teacher_pass import TeacherPass, run_teacher
from dijiang.train.trainer.optimizer import adamw, learning_rate_factor

LAYERS = (4, 11, 18, 25)
BLOCK = 1024
NO_WINDOW = {"attention_window": 0, "attention_sinks": 0}
MAPS = {
    "wdcf m=d": {},
    "wdcf m=2d": {"feature_dim": 128},
    "wdcf m=4d": {"feature_dim": 256},
    "ldcf": {"feature_map": "ldcf"},
    "pff": {"feature_map": "pff"},
    "prf": {"feature_map": "prf"},
    "hedgehog": {"feature_map": "hedgehog"},
    "elu": {"feature_map": "elu"},
    "cosformer": {"feature_map": "cosformer"},
    "relu": {"feature_map": "relu"},
}
# on top of learned decay without a window; sinks need a window, here of the query's own token only
FORGETTING = {
    "": {},
    ", short spans": {"decay_spans": [4, 64]},
    ", short spans, sinks": {"decay_spans": [4, 64], "attention_window": 1, "attention_sinks": 4},
}
LOSSES = {
    "combined + linear branch": {"linear_weight": 1.0},
    "linear branch alone": {"combined_weight": 0.0, "linear_weight": 1.0},
    "window dropout 0.3": {"window_dropout": 0.3},
    "projections too": {"trains": "attention"},
    "no closed-form start": {"calibrate_blocks": 0},
}


def choices() -> dict[str, tuple[dict, dict]]:
    """Settings of the conversion and of the align stage, by the name of the choice."""
    by_name = {}
    for window, window_settings in (("window", {}), ("no window", NO_WINDOW)):
        for decay in ("none", "learned"):
            for name, settings in MAPS.items():
                by_name[f"{name}, {window}, {decay} decay"] = ({**settings, **window_settings, "decay": decay}, {})
    for window, window_settings in (("window", {}), ("no window", NO_WINDOW)):
        for name, settings in LOSSES.items():
            if not window_settings or not settings.keys() & {"linear_weight", "window_dropout"}:
                by_name[f"wdcf m=d, {window}, none decay, {name}"] = (window_settings, settings)
    # whether training the projections makes up for fixed directions, and what heads with shorter spans are worth
    for name in ("wdcf m=d", "ldcf", "pff", "hedgehog", "relu"):
        for forgetting, settings in FORGETTING.items():
            conversion = {**MAPS[name], **NO_WINDOW, "decay": "learned", **settings}
            by_name[f"{name}, no window, learned decay{forgetting}, projections too"] = (conversion, {"trains": "attention"})
    return by_name


def layer_types(layers) -> list[str]:
    return ["linear_attention" if i in layers else "full_attention" for i in range(30)]


class Study:
    """The teacher, its passes over the training and held-out blocks, and the runs against them."""

    def __init__(self, train: list[Path], held_out: list[Path], tokens: int, held_out_blocks: int):
        self.dtype = fastest_dtype("cpu")
        self.teacher, self.tokenizer = load_source(packaged_model(), dtype=self.dtype)
        self.blocks = {}
        for name, files, count in (("train", train, tokens // BLOCK), ("held out", held_out, held_out_blocks)):
            ids = [token for file in files for token in (*read_tokens(self.tokenizer, file), self.tokenizer.eos_token_id)]
            blocks = torch.tensor(ids[: len(ids) // BLOCK * BLOCK]).view(-1, BLOCK)
            spread = torch.linspace(0, len(blocks) - 1, count).round().long()
            self.blocks[name] = blocks[spread]
        self.passes = {name: [self.run_teacher(block) for block in blocks] for name, blocks in self.blocks.items()}
        self.teacher_perplexity = perplexity(self.teacher, self.blocks["held out"])

    def run_teacher(self, block: torch.Tensor) -> TeacherPass:
        """The teacher's pass, with the layers in question only."""
        teacher_pass = run_teacher(self.teacher, block[None])
        for tensors in (teacher_pass.inputs, teacher_pass.outputs):
            for i in set(tensors) - set(LAYERS):
                del tensors[i]
        return teacher_pass

    def make_student(self, settings: dict) -> DiJiangForCausalLM:
        """A student with the teacher's weights, the same as after conversion, without reading the teacher's file again."""
        config = DiJiangConfig(**{**self.teacher.config.to_dict(), **settings})
        student = DiJiangForCausalLM(config)
        added = set(added_parameters(student))
        student.load_state_dict(self.teacher.state_dict(), strict=False)
        for name, parameter in student.named_parameters():
            if name not in added and "decay" not in name:
                parameter.data = parameter.data.to(self.dtype)
        return student

    def run(self, conversion: dict, align: dict, seed: int) -> dict:
        """Train one choice and measure it."""
        config = AlignConfig(tokens=len(self.blocks["train"]) * BLOCK, block_size=BLOCK, seed=seed, **align)
        settings = {"layer_types": layer_types(LAYERS), "feature_seed": 1000 * seed, **conversion}
        student = self.make_student(settings)
        model = AlignModel(student, self.teacher, config, self.dtype)
        order = torch.randperm(config.steps, generator=torch.Generator().manual_seed(seed)).tolist()
        started = time.perf_counter()
        if config.calibrate_blocks:
            model.calibrate(self.blocks["train"][order[: config.calibrate_blocks]])
        groups = model.parameter_groups()
        optimizer = adamw(groups, config)
        peaks = [group["lr"] for group in optimizer.param_groups]
        for step, index in enumerate(order):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * learning_rate_factor(step, config)
            model.train()
            teacher_pass = self.passes["train"][index]
            loss = model.losses(teacher_pass, self.blocks["train"][index][None], sample_indices=torch.tensor([step]))
            loss["loss"].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        result = {"seconds": time.perf_counter() - started} | self.measure(model)
        if student.config.attention_window:
            with linear_only(student):
                result |= {f"linear_only_{name}": value for name, value in self.measure(model).items()}
        return result

    @torch.no_grad()
    def measure(self, model: AlignModel) -> dict:
        """Relative error of the layers, and perplexity over the teacher's, on held-out text."""
        model.eval()
        errors = []
        for block, teacher_pass in zip(self.blocks["held out"], self.passes["held out"], strict=True):
            for i, attention in linear_layers(model.student).items():
                with model.autocast(block.device):
                    q, k, v, _ = attention.project(teacher_pass.inputs[i], teacher_pass.position_embeddings)
                    output = attention.attend(q, k, v)[0].flatten(2)
                    target = teacher_pass.outputs[i]
                    if model.stage.trains == "attention":
                        output = attention.o_proj(output.to(q.dtype))
                        target = model.teacher.model.layers[i].self_attn.o_proj(target)
                errors.append((output.float() - target.float()).square().mean() / target.float().square().mean())
        with model.autocast(torch.device("cpu")):
            ratio = perplexity(model.student, self.blocks["held out"]) / self.teacher_perplexity
        return {"relative_error": torch.stack(errors).mean().item(), "perplexity_ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--held-out-blocks", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="run choices whose name contains this")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "ablation.json")
    arguments = parser.parse_args()
    study = Study(arguments.train, arguments.held_out, arguments.tokens, arguments.held_out_blocks)
    texts = {"train": [path.name for path in arguments.train], "held_out": [path.name for path in arguments.held_out]}
    words = ["--train", *texts["train"], "--held-out", *texts["held_out"]]
    about = {
        "command": " ".join(["python benchmarks/ablation.py", *words]),
        "texts": texts,
        "tokens": arguments.tokens,
        "held_out_blocks": arguments.held_out_blocks,
        "layers": LAYERS,
        "teacher_perplexity": study.teacher_perplexity,
        "machine": machine(),
        "versions": versions(),
    }
    by_choice = earlier_runs(arguments.output, about, ("texts", "tokens", "held_out_blocks", "layers"))
    for seed in range(arguments.seeds):
        for name, (conversion, align) in choices().items():
            runs = by_choice.setdefault(name, {})
            if arguments.only not in name or str(seed) in runs:
                continue
            runs[str(seed)] = study.run(conversion, align, seed)
            console.print(f"{name}, seed {seed}: {runs[str(seed)]}", highlight=False, soft_wrap=True)
            write_json(arguments.output, about | {"runs": by_choice})


if __name__ == "__main__":
    main()

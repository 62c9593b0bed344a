"""
A training step of each stage on a model of SmolLM2-135M's shape against its unavoidable parts. For distillation these are a
plain fine-tuning step and one forward pass of the teacher; for alignment the teacher's pass and the linear layers' own work.

    python benchmarks/training.py [--dtype bfloat16] [--threads 2] [--quick] [--trains all|attention|kernel] [--lora-rank N]
        [--tokens 1024] [--chunk-tokens N] [--output benchmarks/results/training.json]

Weights are random, because no time depends on them; the student has the recommended layers with a linear branch of scale 1.
Both train as in a recipe: float32 weights, under autocast where the dtype is bfloat16, AdamW, clipped gradients. The
fine-tuning step trains all weights with the cross-entropy that the model's own `forward(labels=...)` computes; the teacher's
pass stops at the last hidden states. "Attention alone" is the forward and backward pass of all linear layers, from queries,
keys and values to the gradients of the added parameters. All take turns; the ratios are (fine-tuning step + teacher's pass) /
distillation step and (align step - attention alone) / teacher's pass.
"""

import argparse
from contextlib import nullcontext

import measure
import model as shapes
import torch

from dijiang.evaluate.latency.timing import alternate
from dijiang.modeling import DiJiangConfig, DiJiangForCausalLM
from dijiang.modeling.linear_attention_layer import linear_layers
from dijiang.train import AlignConfig, DistillConfig
from dijiang.train.stages.align import AlignModel
from dijiang.train.stages.distill import DistillModel
from dijiang.train.stages.teacher_pass import run_teacher


def build(shape: dict, dtype: torch.dtype, arguments: argparse.Namespace):
    """A softmax model to fine-tune, in float32, and a `DistillModel` and an `AlignModel` whose teacher has its weights."""
    full = ["full_attention"] * shape["num_hidden_layers"]
    plain = DiJiangForCausalLM(DiJiangConfig(**shape, layer_types=full))
    teacher = DiJiangForCausalLM(DiJiangConfig(**shape, layer_types=full))
    teacher.load_state_dict(plain.state_dict())
    students = [DiJiangForCausalLM(DiJiangConfig(**shape, branch_scale_init=0.0)) for _ in range(2)]
    for student in students:
        student.load_state_dict(plain.state_dict(), strict=False)
    chosen = {"chunk_tokens": arguments.chunk_tokens} if arguments.chunk_tokens else {}
    config = DistillConfig(
        tokens=arguments.tokens, block_size=arguments.tokens, trains=arguments.trains, lora_rank=arguments.lora_rank, **chosen
    )
    distill = DistillModel(students[0], teacher.to(dtype), config, dtype)
    stage = AlignConfig(tokens=arguments.tokens, block_size=arguments.tokens)
    return plain.train(), distill.train(), AlignModel(students[1].to(dtype), teacher, stage, dtype).train()


def attention_alone(align, ids: torch.Tensor):
    """A function that runs all linear layers forward and backward, on queries, keys and values computed beforehand."""
    teacher_pass = run_teacher(align.teacher, ids)
    inputs = []
    for i, layer in linear_layers(align.student).items():
        with torch.no_grad(), align.autocast(ids.device):
            inputs.append((layer, layer.project(teacher_pass.inputs[i], teacher_pass.position_embeddings)[:3]))

    def call() -> None:
        for layer, (q, k, v) in inputs:
            own = [p for p in layer.parameters() if p.requires_grad]
            torch.autograd.grad(layer.attend(q, k, v)[0].square().mean(), own)

    return call


def steps(plain, distill, align, ids: torch.Tensor, dtype: torch.dtype) -> dict:
    """The calls to time, by name."""
    groups = [{"params": group["params"], "lr": group["lr"]} for group in distill.parameter_groups()]
    trained = [parameter for group in groups for parameter in group["params"]]
    aligned = [p for p in align.parameters() if p.requires_grad]
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4, fused=True)
    distill_optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    align_optimizer = torch.optim.AdamW(aligned, lr=1e-4, fused=True)

    def update(loss: torch.Tensor, parameters, optimizer) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def fine_tune() -> None:
        with nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype):
            loss = plain(input_ids=ids, labels=ids, use_cache=False).loss
        update(loss, list(plain.parameters()), plain_optimizer)

    def teacher_pass() -> None:
        with torch.no_grad():
            distill.teacher.model(input_ids=ids, use_cache=False)

    return {
        "fine-tuning step": fine_tune,
        "teacher's pass": teacher_pass,
        "distillation step": lambda: update(distill(input_ids=ids)["loss"], trained, distill_optimizer),
        "attention alone": attention_alone(align, ids),
        "align step": lambda: update(align(input_ids=ids)["loss"], aligned, align_optimizer),
    }


def compare(dtype: str, arguments: argparse.Namespace, shape: dict, options: dict) -> dict:
    """A row of the result."""
    models = build(shape, getattr(torch, dtype), arguments)
    ids = torch.randint(0, shape["vocab_size"], (1, arguments.tokens))
    calls = steps(*models, ids, getattr(torch, dtype))
    timings = alternate(calls, **options)
    measure.show_timings(f"{dtype}, {arguments.tokens:,} tokens", timings, "fine-tuning step")
    spent = {name: x["median_s"] for name, x in timings.items()}
    ratio = (spent["fine-tuning step"] + spent["teacher's pass"]) / spent["distillation step"]
    align = (spent["align step"] - spent["attention alone"]) / spent["teacher's pass"]
    return {
        "dtype": dtype,
        "tokens": arguments.tokens,
        "timings": timings,
        "tokens_per_s": {name: arguments.tokens / seconds for name, seconds in spent.items()},
        "ratios": {"distill": ratio, "align": align},
        "backend": measure.backend_of(calls["distillation step"]),
    }


def targets_of(row: dict) -> list[dict]:
    distill = f"{row['dtype']}: (fine-tuning step + teacher's pass) / distillation step"
    align = f"{row['dtype']}: (align step - attention alone) / teacher's pass"
    return [
        measure.target(distill, 0.8, row["ratios"]["distill"]),
        measure.target(align, 1.3, row["ratios"]["align"], at_most=True),
    ]


def run(arguments: argparse.Namespace) -> dict:
    quick = arguments.quick
    shape = shapes.TINY if quick else shapes.SHAPE
    settings = {key: getattr(arguments, key) for key in ("trains", "lora_rank", "chunk_tokens")}
    options = {"rounds": arguments.rounds, "seconds": 0.0 if quick else 30.0}
    rows = [compare(dtype, arguments, shape, options) for dtype in arguments.dtype]
    backend = {row["dtype"]: measure.check_backend(arguments.backend, {"training": row["backend"]}) for row in rows}
    targets = [] if quick else [target for row in rows for target in targets_of(row)]
    return {"shape": shape, "settings": settings, "backend": backend, "steps": rows, "targets": targets}


def main() -> None:
    parser = measure.common_arguments(__doc__, ["bfloat16"])
    parser.add_argument("--trains", choices=("all", "attention", "kernel"), default="all")
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--tokens", type=int, help="per step; default 1024, with --quick 64")
    parser.add_argument("--chunk-tokens", type=int, help="logits in memory at a time, in tokens; default: the recipe's")
    arguments = parser.parse_args()
    arguments.tokens = arguments.tokens or (64 if arguments.quick else 1024)
    measure.prepare(arguments)
    measure.finish(arguments, "training", measure.header(arguments, "training") | run(arguments))


if __name__ == "__main__":
    main()

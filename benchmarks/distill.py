"""
One distillation step on a model of SmolLM2-135M's shape against what it cannot do without: a plain fine-tuning step of the
teacher, and one forward pass of it.

    python benchmarks/distill.py [--dtype bfloat16] [--threads 2] [--quick] [--trains all|attention|kernel] [--lora-rank N]
        [--tokens 1024] [--chunk-tokens N] [--output benchmarks/results/distill.json]

Weights are random, which no time depends on; the student has the recommended layers with a linear branch that speaks. Both
train as in a recipe: float32 weights, under autocast where the dtype is bfloat16, AdamW, gradients clipped. The fine-tuning
step trains all weights with the cross-entropy that the model's own `forward(labels=...)` computes; the teacher's pass stops at
the last hidden states. The three take turns, and the ratio is (fine-tuning step + teacher's pass) / distillation step.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path

import measure
import model as shapes
import torch


def build(shape: dict, dtype: torch.dtype, arguments: argparse.Namespace):
    """A softmax model to fine-tune, in float32, and a `DistillModel` whose teacher has its weights."""
    from dijiang.modeling import DiJiangConfig, DiJiangForCausalLM
    from dijiang.train.config import DistillConfig
    from dijiang.train.distill_model import DistillModel

    full = ["full_attention"] * shape["num_hidden_layers"]
    plain = DiJiangForCausalLM(DiJiangConfig(**shape, layer_types=full))
    teacher = DiJiangForCausalLM(DiJiangConfig(**shape, layer_types=full))
    teacher.load_state_dict(plain.state_dict())
    student = DiJiangForCausalLM(DiJiangConfig(**shape, branch_scale_init=0.0))
    student.load_state_dict(plain.state_dict(), strict=False)
    chosen = {"chunk_tokens": arguments.chunk_tokens} if arguments.chunk_tokens else {}
    config = DistillConfig(
        tokens=arguments.tokens, block_size=arguments.tokens, trains=arguments.trains, lora_rank=arguments.lora_rank, **chosen
    )
    return plain.train(), DistillModel(student, teacher.to(dtype), config, dtype).train()


def steps(plain, distill, ids: torch.Tensor, dtype: torch.dtype) -> dict:
    """The calls to time, by name."""
    groups = [{"params": group["params"], "lr": group["lr"]} for group in distill.parameter_groups()]
    trained = [parameter for group in groups for parameter in group["params"]]
    plain_optimizer, optimizer = (torch.optim.AdamW(x, lr=1e-4, fused=True) for x in (plain.parameters(), groups))

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
        "distillation step": lambda: update(distill(input_ids=ids)["loss"], trained, optimizer),
    }


def compare(dtype: str, arguments: argparse.Namespace, shape: dict, options: dict) -> dict:
    """A row of the result."""
    plain, distill = build(shape, getattr(torch, dtype), arguments)
    ids = torch.randint(0, shape["vocab_size"], (1, arguments.tokens))
    calls = steps(plain, distill, ids, getattr(torch, dtype))
    timings = measure.alternate(calls, **options)
    measure.show_timings(f"{dtype}, {arguments.tokens:,} tokens", timings, "fine-tuning step")
    spent = {name: x["median_s"] for name, x in timings.items()}
    ratio = (spent["fine-tuning step"] + spent["teacher's pass"]) / spent["distillation step"]
    rate = arguments.tokens / spent["distillation step"]
    measure.console.print(f"(fine-tuning step + teacher's pass) / distillation step: {ratio:.2f}; {rate:,.1f} tokens/s")
    return {
        "dtype": dtype,
        "tokens": arguments.tokens,
        "timings": timings,
        "tokens_per_s": {name: arguments.tokens / seconds for name, seconds in spent.items()},
        "ratio": ratio,
        "trained_parameters": sum(p.numel() for p in distill.parameters() if p.requires_grad),
        "backend": measure.backend_of(calls["distillation step"]),
    }


def run(arguments: argparse.Namespace) -> dict:
    quick = arguments.quick
    shape = shapes.TINY if quick else shapes.SHAPE
    settings = {key: getattr(arguments, key) for key in ("trains", "lora_rank", "chunk_tokens")}
    options = {"rounds": arguments.rounds, "seconds": 0.0 if quick else 30.0}
    rows = [compare(dtype, arguments, shape, options) for dtype in arguments.dtype]
    backend = {row["dtype"]: measure.check_backend(arguments.backend, {"training": row["backend"]}) for row in rows}
    return {"shape": shape, "settings": settings, "backend": backend, "steps": rows, "targets": []}


def main() -> None:
    parser = measure.common_arguments(__doc__, ["bfloat16"])
    parser.add_argument("--trains", choices=("all", "attention", "kernel"), default="all")
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--tokens", type=int, help="per step; default 1024, with --quick 64")
    parser.add_argument("--chunk-tokens", type=int, help="whose logits are in memory at a time; default: the recipe's")
    arguments = parser.parse_args()
    arguments.tokens = arguments.tokens or (64 if arguments.quick else 1024)
    measure.choose_backend(arguments.backend)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    result = measure.header(arguments, "distill.py") | run(arguments)
    output = arguments.output or (None if arguments.quick else Path(__file__).parent / "results" / "distill.json")
    if output:
        measure.write_json(output, result)


if __name__ == "__main__":
    main()

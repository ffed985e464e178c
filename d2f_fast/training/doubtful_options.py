"""Say which options of a run are accepted, but probably not meant. Imports no torch."""

from d2f_fast.config import TrainingConfig
from d2f_fast.image_sizes import sizes_of


def doubts(config: TrainingConfig, own_size: int | None) -> list[str]:
    """Return a line on each option that is probably not meant.

    Args:
        config: options of the run, with its sizes.
        own_size: side of the images that the model was made for, in pixels; None where the model does not say it.
    """
    lines = []
    for size in dict.fromkeys(() if own_size is None or config.resolution is None else sizes_of(config.resolution)):
        side = (size.height * size.width) ** 0.5
        if own_size is not None and not own_size <= 2 * side <= 4 * own_size:
            named = size.height if size.height == size.width else size
            far = "less than half of" if side < own_size else "more than twice"
            lines.append(
                f"resolution {named} is {far} the size that the model was made for, {own_size} x {own_size} pixels:"
                " expect worse images, or leave --resolution out"
            )
    warmup, steps = config.lr_warmup_steps, config.max_train_steps
    if warmup >= steps:
        lines.append(
            f"lr_warmup_steps {warmup} is not shorter than the run: the learning rate only reaches {steps / warmup:.0%}"
            f" of {config.learning_rate:g}"
        )
    return lines


def doubts_about_pairs(config: TrainingConfig, lora: object) -> list[str]:
    """Return a line on each way in which a run on pairs probably starts from another network than was meant.

    Args:
        config: options of the run.
        lora: entry "lora" of the pairs' meta.json: the LoRA with which they were made; empty or None for none.
    """
    lines = []
    if lora and config.init_lora is None:
        lines.append(
            "the pairs were made with a LoRA, and the run starts without it: to start where they were made, give it as"
            " --init_lora"
        )
    if config.distill and config.adapter == "lora" and config.init_lora is None:
        lines.append(
            "--distill learns a single jump, which follows a straightened path only: unless the model was trained on"
            " pairs before, train without --distill first, and give the result as --init_lora"
        )
    return lines

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

"""Options of images with depth. This module imports no numpy and no torch, so that `d2f --help` answers at once."""

from dataclasses import dataclass
from typing import Literal

from d2f_fast.config import TrainingConfig, at_least, check_options, option, positive
from d2f_fast.errors import RefusedInputError

DepthNormalization = Literal["affine", "log", "disparity"]
MAX_DEPTH = 1e6  # metres, and numbers that stand for a metre


@dataclass(frozen=True)
class DepthOptions:
    """Hold the options that say how depth is read and what a model learns of it.

    Args:
        depth_normalization: How the depth of each image is scaled to [-1, 1]. "affine": linearly, between its 2 % and
            98 % quantile, as Marigold (a depth model) does. "log": its logarithm, between the 1 % and 99 % quantile,
            which is finer nearby, as the code of the Diff2Flow paper does. "disparity": its inverse, between the 2 %
            and 98 % quantile.
        depth_scale: Number in the depth files that stands for one metre, such as 1000 for millimetres. Files of whole
            numbers in a plain folder need it. With several folders it is that of the plain ones alone, and so are the
            next two options. Default: metres for floating-point files; the unit of a data set whose layout is
            recognised, see docs/depth.md.
        depth_min: Smallest depth that counts, in metres. Nearer pixels are left out. 0 counts every positive depth.
        depth_max: Largest depth that counts, in metres. Farther pixels are left out. Default: no limit in a plain
            folder; that of a recognised data set, such as 80 for Virtual KITTI 2 and 65 for Hypersim.

    Raises:
        RefusedInputError: An option has a value that it does not take, or the range is empty.
    """

    depth_normalization: DepthNormalization = option("depth", "affine")
    depth_scale: float | None = option("depth", None, positive(MAX_DEPTH))
    depth_min: float = option("depth", 0.0, at_least(0, MAX_DEPTH))
    depth_max: float | None = option("depth", None, positive(MAX_DEPTH))

    def __post_init__(self) -> None:
        """Refuse values that an option does not take, and an empty range."""
        check_options(self)
        if self.depth_max is not None and self.depth_max <= self.depth_min:
            raise RefusedInputError(f"depth_max must be above depth_min {self.depth_min}, got {self.depth_max}")


def check_depth_training(config: TrainingConfig) -> None:
    """Refuse options that have no effect, or no use, where depth is learned as one jump from zeros.

    Args:
        config: Options of the run.

    Raises:
        RefusedInputError: A shift is to be saved for several sampling steps, a LoRA file is for other programs, which
            start from noise, or LPIPS is in the loss, which knows no valid pixels.
    """
    if not config.distill:
        return
    if config.lpips_weight:
        raise RefusedInputError(
            "lpips_weight compares whole images, and only the valid pixels of depth count, got"
            f" {config.lpips_weight:g}: leave it out with distill on depth"
        )
    if config.sampling_shift not in (None, 1.0):
        raise RefusedInputError(
            "sampling_shift has no effect with distill on depth, which is then predicted in one step, got"
            f" {config.sampling_shift}: leave it out"
        )
    if config.lora_format not in (None, "diffusers"):
        raise RefusedInputError(
            f"lora_format {config.lora_format} is for programs that start from noise, and distill on depth starts from"
            " zeros: leave it out"
        )

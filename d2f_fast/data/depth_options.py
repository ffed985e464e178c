"""Options of images with depth. This module imports no numpy and no torch, so that `d2f --help` answers at once."""

from dataclasses import dataclass
from typing import Literal

from d2f_fast.config import at_least, check_options, option, positive
from d2f_fast.errors import RefusedInputError

DepthNormalization = Literal["affine", "log", "disparity"]
_MOST = 1e6


@dataclass(frozen=True)
class DepthOptions:
    """Hold the options that say how depth is read and what a model learns of it.

    Args:
        depth_normalization: What a model learns with --task depth. "affine" is Marigold's: depth between its 2 % and
            98 % quantile in each image. "log" is that of the published Diff2Flow code: the logarithm between the 1 %
            and 99 % quantile, which is finer nearby. "disparity" is the inverse depth between its 2 % and 98 %
            quantile.
        depth_scale: Number in the depth files that stands for one metre: 1000 for millimetres, 256 for KITTI. The
            default None means metres for floating-point files and the unit of a known data set; files of whole numbers
            in a plain folder need it.
        depth_min: Smallest depth in metres that counts; pixels below it are left out, as those without a depth are. The
            default 0 counts every positive depth.
        depth_max: Largest depth in metres that counts. The default None means that of a known data set (80 for Virtual
            KITTI 2, 65 for Hypersim), and none for a plain folder.

    Raises:
        RefusedInputError: An option has a value that it does not take, or the range is empty.
    """

    depth_normalization: DepthNormalization = option("data", "affine")
    depth_scale: float | None = option("data", None, positive(_MOST))
    depth_min: float = option("data", 0.0, at_least(0, _MOST))
    depth_max: float | None = option("data", None, positive(_MOST))

    def __post_init__(self) -> None:
        """Refuse values that an option does not take, and an empty range."""
        check_options(self)
        if self.depth_max is not None and self.depth_max <= self.depth_min:
            raise RefusedInputError(f"depth_max must be above depth_min {self.depth_min}, got {self.depth_max}")

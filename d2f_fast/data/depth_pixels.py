"""Make training pixels of an image and its depth: the same resizing, crop and mirroring for both."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2f_fast.data.depth_normalization import normalize_depth, valid_share
from d2f_fast.data.depth_options import DepthNormalization
from d2f_fast.data.depth_source import DepthSample
from d2f_fast.data.images import crop_of, preprocess
from d2f_fast.data.loading import refused_sample
from d2f_fast.data.order import Augmentation
from d2f_fast.image_sizes import Size


class DepthPixels(NamedTuple):
    """Training pixels of one image.

    Attributes:
        image: [3, H, W] float32 in [-1, 1].
        depth: [3, H, W] float32, the normalised depth in three equal channels.
        mask: Share of valid pixels of each latent, [1, h, w] float32 in [0, 1]; 0 everywhere where the crop has none.
    """

    image: Tensor
    depth: Tensor
    mask: Tensor


def depth_pixels(
    sample: DepthSample,
    augmentation: Augmentation,
    size: int | Size,
    pixels_per_latent: int,
    normalization: DepthNormalization,
    *,
    random_flip: bool,
    center_crop: bool,
) -> DepthPixels:
    """Return the training pixels of a sample, cropped and mirrored as its augmentation says.

    The image is resized with Lanczos, its depth by the nearest pixel, which invents no depth between two surfaces. The
    depth is normalised after the crop, by what is left of it.

    Args:
        sample: Image with its depth.
        augmentation: Random numbers of the sample in this epoch.
        size: Size to which image and depth are resized and cropped, multiples of `pixels_per_latent`; one number is the
            side of a square.
        pixels_per_latent: Number of pixels along each side of one latent.
        normalization: Which normalisation of the depth.
        random_flip: Whether the augmentation may mirror the image.
        center_crop: Whether the middle is cropped. Otherwise the augmentation gives the position.

    Raises:
        DatasetError: The image is too elongated for the size.
    """
    flip = random_flip and augmentation.mirrored
    with refused_sample(sample.name):
        image = preprocess(sample.image, size, center_crop, flip, augmentation.crop)
        resized, box = crop_of(sample.image.size, size, center_crop, augmentation.crop)
    depth, valid = (
        np.asarray(Image.fromarray(values).resize(resized, Image.Resampling.NEAREST).crop(box))
        for values in (sample.depth, sample.valid.astype(np.uint8))
    )
    if flip:
        depth, valid = depth[:, ::-1], valid[:, ::-1]
    known = valid.astype(bool)
    values = normalize_depth(depth, known, normalization)[0] if known.any() else np.zeros_like(depth)
    channels = torch.from_numpy(np.ascontiguousarray(values)).expand(3, -1, -1).contiguous()
    return DepthPixels(image, channels, torch.from_numpy(valid_share(known, pixels_per_latent))[None])

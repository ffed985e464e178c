"""Measure how many images show the background colour and the name of their caption."""

import torch
from torch import Tensor


def corner_pixels(images: Tensor, side: int = 2) -> Tensor:
    """Return the pixels of the four corners.

    Args:
        images: images [B, C, H, W].
        side: width and height of a corner in pixels.

    Returns:
        Pixels [B, C, 4 * side²].
    """
    ends = torch.cat([torch.arange(side), torch.arange(-side, 0)])
    return images[..., ends, :][..., ends].flatten(2)


def corner_colours(images: Tensor, palette: Tensor, side: int = 2) -> Tensor:
    """Return the index of the colour that is nearest to the median of the four corners.

    Args:
        images: images [B, C, H, W].
        palette: colours [colours, C], in the same units as the images.
        side: width and height of a corner in pixels.

    Returns:
        Indices into the palette, [B] int64.
    """
    return torch.cdist(corner_pixels(images, side).median(dim=-1).values, palette).argmin(dim=-1)


def background_accuracy(images: Tensor, colours: Tensor, palette: Tensor, free_corners: Tensor) -> tuple[float, int]:
    """Return the fraction of images whose corners have the captioned colour, and how many images were counted.

    Args:
        images: images [B, C, H, W].
        colours: index of each captioned colour in the palette, [B] int64.
        palette: colours [colours, C], in the same units as the images.
        free_corners: [B] bool; images with False are left out, because their subject covers a corner.

    Returns:
        Fraction in [0, 1], or nan if no image was counted; and the number of images counted.
    """
    right = (corner_colours(images, palette) == colours)[free_corners]
    return (right.double().mean().item() if len(right) else float("nan")), len(right)


def name_accuracy(logits: Tensor, names: Tensor, top: int = 1) -> float:
    """Return the fraction of images whose name is among the classifier's most likely ones.

    Args:
        logits: output of the classifier, [B, names].
        names: index of the right name of each image, [B] int64.
        top: number of most likely names that count.

    Returns:
        Fraction in [0, 1].
    """
    return (logits.topk(top, dim=-1).indices == names[:, None]).any(-1).double().mean().item()

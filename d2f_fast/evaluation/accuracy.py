"""Judge whether pictures show the captioned background colour and name."""

import torch
from torch import Tensor


def corner_pixels(pictures: Tensor, side: int = 2) -> Tensor:
    """The four corners, `side` pixels along each side: [B, C, 4 * side²] of pictures [B, C, H, W]."""
    ends = torch.cat([torch.arange(side), torch.arange(-side, 0)])
    return pictures[..., ends, :][..., ends].flatten(2)


def corner_colours(pictures: Tensor, palette: Tensor, side: int = 2) -> Tensor:
    """Index of the palette's colour nearest to the median of the four corners, [B].

    Args:
        pictures: [B, C, H, W].
        palette: [colours, C], in the same units.
        side: pixels of a corner along each side.
    """
    return torch.cdist(corner_pixels(pictures, side).median(dim=-1).values, palette).argmin(dim=-1)


def background_accuracy(pictures: Tensor, colours: Tensor, palette: Tensor, readable: Tensor) -> tuple[float, int]:
    """Share of the pictures whose corners are of the captioned colour, and how many were read.

    Args:
        pictures: [B, C, H, W].
        colours: [B], index into the palette.
        palette: [colours, C].
        readable: [B] bool, false where what is drawn covers a corner.
    """
    right = (corner_colours(pictures, palette) == colours)[readable]
    return (right.double().mean().item() if len(right) else float("nan")), len(right)


def name_accuracy(logits: Tensor, names: Tensor, top: int = 1) -> float:
    """Share of the pictures whose name is among the classifier's first `top`; logits [B, names], names [B]."""
    return (logits.topk(top, dim=-1).indices == names[:, None]).any(-1).double().mean().item()

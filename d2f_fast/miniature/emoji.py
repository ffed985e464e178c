"""Make the captioned images of the miniature: emoji from two sprite sheets on solid backgrounds.

The base model was trained on the style "noto" (Noto Emoji, Apache-2.0); finetuning teaches the style "fluent" (Fluent
Emoji 3D, MIT). An image is 32 × 32 RGB in [-1, 1]; its caption is "a <name> on a <colour> background".
`pictures/NOTICE` gives the sources.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d2f_fast.evaluation.accuracy import corner_pixels

FOLDER = Path(__file__).parent / "pictures"
SIZE = 32  # pixels
COLUMNS = 32  # sprites in one row of a sheet
STYLES = ("noto", "fluent")
BACKGROUNDS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "red": (224, 32, 32),
    "green": (32, 160, 64),
    "blue": (32, 80, 224),
    "yellow": (250, 210, 40),
    "grey": (128, 128, 128),
    "purple": (140, 60, 200),
}
HELD_OUT_FRACTION = 0.1
SPLIT_SEED = 2506


@dataclass(frozen=True)
class Emoji:
    """Content of one image.

    Args:
        name: index of the sprite in `names()`.
        colour: index of the background colour in `BACKGROUNDS`.
        mirrored: whether the sprite is mirrored left to right.
    """

    name: int
    colour: int
    mirrored: bool = False


@functools.cache
def names() -> tuple[str, ...]:
    """Return the names of the sprites, in the order of the sheets."""
    return tuple(entry["name"] for entry in json.loads((FOLDER / "names.json").read_text()))


@functools.cache
def names_in_both_styles() -> tuple[int, ...]:
    """Return the indices of the names that both styles have; "noto" has all."""
    entries = json.loads((FOLDER / "names.json").read_text())
    return tuple(i for i, entry in enumerate(entries) if entry["fluent"])


@functools.cache
def held_out_pairs() -> frozenset[tuple[int, int]]:
    """Return the (name, colour) combinations, 10 %, that the base model was not trained on."""
    generator = np.random.default_rng(SPLIT_SEED)
    held_out = generator.random((len(names()), len(BACKGROUNDS))) < HELD_OUT_FRACTION
    return frozenset(zip(*(axis.tolist() for axis in held_out.nonzero()), strict=True))


@functools.cache
def held_out_names() -> frozenset[int]:
    """Return the names, 10 % of those in both styles, that finetuning to the second style never sees."""
    both = names_in_both_styles()
    generator = np.random.default_rng(SPLIT_SEED + 1)
    return frozenset(generator.choice(both, round(HELD_OUT_FRACTION * len(both)), replace=False).tolist())


@functools.cache
def names_with_free_corners() -> frozenset[int]:
    """Return the names whose sprites, in both styles, leave every 2 × 2 corner to the background."""
    covered = torch.zeros(len(names()), dtype=torch.bool)
    for style in STYLES:
        corners = corner_pixels(sprites(style)[:, 3:].float())
        covered |= corners.amax(dim=(1, 2)) > 25
    return frozenset((~covered).nonzero().squeeze(-1).tolist())


def background_palette() -> Tensor:
    """Return the background colours, [colours, 3] in [-1, 1]."""
    return torch.tensor(tuple(BACKGROUNDS.values())) / 127.5 - 1


def caption(name: int, colour: int | None) -> str:
    """Return the caption of an image.

    Args:
        name: index of the name.
        colour: index of the background colour; None leaves the background out of the caption.
    """
    article = "an" if names()[name][0] in "aeiou" else "a"
    background = "" if colour is None else f" on a {tuple(BACKGROUNDS)[colour]} background"
    return f"{article} {names()[name]}{background}"


def name_of_caption(text: str) -> int | None:
    """Return the index of the name in a caption that `caption` made; None for any other text."""
    before, _, background = text.strip().partition(" on a ")
    colour = background.removesuffix(" background")
    if background and (colour == background or colour not in BACKGROUNDS):
        return None
    return _captions_without_background().get(before)


@functools.cache
def _captions_without_background() -> dict[str, int]:
    """Return the index of each name by its caption without a background."""
    return {caption(name, None): name for name in range(len(names()))}


@functools.cache
def sprites(style: str) -> Tensor:
    """Return all sprites of a style, [names, 4, 32, 32] uint8 RGBA; a name that the style lacks is transparent.

    Raises:
        ValueError: The style is not one of `STYLES`.
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {STYLES}, got {style!r}")
    with Image.open(FOLDER / f"{style}.webp") as sheet:
        pixels = np.asarray(sheet.convert("RGBA"))
    rows = pixels.shape[0] // SIZE
    cells = pixels.reshape(rows, SIZE, COLUMNS, SIZE, 4).transpose(0, 2, 4, 1, 3)
    return torch.from_numpy(cells.reshape(rows * COLUMNS, 4, SIZE, SIZE)[: len(names())].copy())


def composite(rgba: Tensor, backgrounds: Tensor) -> Tensor:
    """Lay sprites over solid backgrounds.

    Args:
        rgba: sprites [B, 4, H, W] uint8, alpha not premultiplied.
        backgrounds: colours [B, 3], 0 to 255.

    Returns:
        RGB images [B, 3, H, W] float32 in [-1, 1].
    """
    alpha = rgba[:, 3:].float() / 255
    over = rgba[:, :3].float() * alpha + backgrounds.float()[:, :, None, None] * (1 - alpha)
    return over / 127.5 - 1


def render(items: Sequence[Emoji], style: str) -> Tensor:
    """Render images in one style, [B, 3, 32, 32] float32 in [-1, 1]."""
    palette = torch.tensor(tuple(BACKGROUNDS.values()))
    rgba = sprites(style)[[item.name for item in items]]
    mirrored = torch.tensor([item.mirrored for item in items])
    rgba = torch.where(mirrored[:, None, None, None], rgba.flip(-1), rgba)
    return composite(rgba, palette[[item.colour for item in items]])

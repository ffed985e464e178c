"""The captioned pictures of the miniature: two sprite sheets of the same emoji, composited on solid backgrounds.

Style "noto" (Noto Emoji, Apache-2.0) trained the base model; style "fluent" (Fluent Emoji 3D, MIT) is the finetuning
task. A picture is 32x32 RGB in [-1, 1]; its caption is "a <name> on a <colour> background". `pictures/NOTICE` gives the
sources.
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

FOLDER = Path(__file__).parent / "pictures"
SIZE = 32
COLUMNS = 32
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
HELD_OUT_SHARE = 0.1
SPLIT_SEED = 2506


@dataclass(frozen=True)
class Picture:
    """One picture to draw: sprite `name` (index) on background `colour` (index), mirrored or not."""

    name: int
    colour: int
    mirrored: bool = False


@functools.cache
def names() -> tuple[str, ...]:
    """Names in sheet order."""
    return tuple(entry["name"] for entry in json.loads((FOLDER / "names.json").read_text()))


@functools.cache
def names_in_both_styles() -> tuple[int, ...]:
    """Indices of the names that the second style has too."""
    entries = json.loads((FOLDER / "names.json").read_text())
    return tuple(i for i, entry in enumerate(entries) if entry["fluent"])


@functools.cache
def held_out_pairs() -> frozenset[tuple[int, int]]:
    """The (name, colour) combinations, 10 %, that the base model was not trained on."""
    generator = np.random.default_rng(SPLIT_SEED)
    draw = generator.random((len(names()), len(BACKGROUNDS))) < HELD_OUT_SHARE
    return frozenset(zip(*(axis.tolist() for axis in draw.nonzero()), strict=True))


@functools.cache
def held_out_names() -> frozenset[int]:
    """The names, 10 % of those in both styles, that finetuning to the second style never sees."""
    both = names_in_both_styles()
    generator = np.random.default_rng(SPLIT_SEED + 1)
    return frozenset(generator.choice(both, round(HELD_OUT_SHARE * len(both)), replace=False).tolist())


def caption(name: int, colour: int | None) -> str:
    """Caption of a picture; `colour=None` leaves the background open."""
    article = "an" if names()[name][0] in "aeiou" else "a"
    background = "" if colour is None else f" on a {tuple(BACKGROUNDS)[colour]} background"
    return f"{article} {names()[name]}{background}"


@functools.cache
def sprites(style: str) -> Tensor:
    """All sprites of a style, [names, 4, 32, 32] uint8 RGBA; transparent where the style lacks the name."""
    if style not in STYLES:
        raise ValueError(f"style must be one of {STYLES}, got {style!r}")
    with Image.open(FOLDER / f"{style}.webp") as sheet:
        pixels = np.asarray(sheet.convert("RGBA"))
    rows = pixels.shape[0] // SIZE
    cells = pixels.reshape(rows, SIZE, COLUMNS, SIZE, 4).transpose(0, 2, 4, 1, 3)
    return torch.from_numpy(cells.reshape(rows * COLUMNS, 4, SIZE, SIZE)[: len(names())].copy())


def composite(rgba: Tensor, backgrounds: Tensor) -> Tensor:
    """Sprites over solid backgrounds, as float32 RGB in [-1, 1].

    Args:
        rgba: [B, 4, H, W] uint8, straight alpha.
        backgrounds: [B, 3], 0 to 255.
    """
    alpha = rgba[:, 3:].float() / 255
    over = rgba[:, :3].float() * alpha + backgrounds.float()[:, :, None, None] * (1 - alpha)
    return over / 127.5 - 1


def draw(pictures: Sequence[Picture], style: str) -> Tensor:
    """The pictures, [B, 3, 32, 32] float32 in [-1, 1]."""
    palette = torch.tensor(tuple(BACKGROUNDS.values()))
    rgba = sprites(style)[[picture.name for picture in pictures]]
    mirrored = torch.tensor([picture.mirrored for picture in pictures])
    rgba = torch.where(mirrored[:, None, None, None], rgba.flip(-1), rgba)
    return composite(rgba, palette[[picture.colour for picture in pictures]])

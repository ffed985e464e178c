"""Measure how well the miniature's images show their captions: the stage `evaluate` of `build.py`."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from d2f_fast.evaluation.accuracy import background_accuracy
from d2f_fast.miniature import emoji, load_miniature
from d2f_fast.miniature.build_classifier import rank_line, ranks_of
from d2f_fast.miniature.classifier import load_classifier

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

SEED = 0
GUIDANCE_SCALES = (1.5, 2.0, 3.0, 5.0)


@torch.no_grad()
def sample(
    pipe: "StableDiffusionPipeline", captions: Sequence[str], guidance: float, steps: int, seed: int, batch: int = 100
) -> Tensor:
    """Generate one image for each caption by DDIM with classifier-free guidance.

    Args:
        pipe: the miniature's pipeline.
        captions: B captions.
        guidance: guidance scale.
        steps: DDIM steps.
        seed: seed of the noise.
        batch: images in one call of the UNet, before guidance doubles them.

    Returns:
        Images [B, 3, 32, 32] in [-1, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    length = pipe.tokenizer.model_max_length
    images = []
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        texts = [""] * len(part) + list(part)
        ids = pipe.tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt").input_ids
        context = pipe.text_encoder(ids).last_hidden_state
        latents = torch.randn(len(part), 4, 8, 8, generator=generator)
        pipe.scheduler.set_timesteps(steps)
        for timestep in pipe.scheduler.timesteps:
            unconditional, conditional = pipe.unet(latents.repeat(2, 1, 1, 1), timestep, context).sample.chunk(2)
            epsilon = unconditional + guidance * (conditional - unconditional)
            latents = pipe.scheduler.step(epsilon, timestep, latents).prev_sample
        images.append(pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.clamp(-1, 1))
    return torch.cat(images)


def evaluate(count: int, steps: int, grid: Path | None) -> None:
    """Print background and name accuracy for trained and held-out combinations, at the best of four guidance scales.

    Args:
        count: images of the trained combinations, and as many of the held-out ones.
        steps: DDIM steps for each image.
        grid: image file for the first 128 images of trained combinations; None for none.
    """
    pipe, classifier = load_miniature(), load_classifier()
    free = emoji.names_with_free_corners()
    pairs = list(itertools.product(range(len(emoji.names())), range(len(emoji.BACKGROUNDS))))
    groups = {
        "trained": [pair for pair in pairs if pair not in emoji.held_out_pairs()],
        "held out": [pair for pair in pairs if pair in emoji.held_out_pairs()],
    }

    def measure(group: str, size: int, guidance: float, seed: int) -> tuple[float, Tensor, Tensor]:
        order = torch.randperm(len(groups[group]), generator=torch.Generator().manual_seed(seed))[:size]
        chosen = [groups[group][i] for i in order]
        images = sample(pipe, [emoji.caption(*pair) for pair in chosen], guidance, steps, seed)
        names, colours = torch.tensor(chosen).unbind(-1)
        free_corners = torch.tensor([name in free for name, _ in chosen])
        background, counted = background_accuracy(images, colours, emoji.background_palette(), free_corners)
        ranks = ranks_of(classifier, images, names)
        line = f"background {background:.1%} of {counted}, {rank_line(ranks)}"
        print(f"{group}, {len(chosen)} images, guidance {guidance}: {line}", flush=True)
        return background, ranks, images

    scores = {}
    for guidance in GUIDANCE_SCALES:
        background, ranks, _ = measure("trained", max(100, count // 5), guidance, SEED + 1)
        scores[guidance] = (ranks < 5).float().mean().item() + (ranks < 1).float().mean().item() + background
    best = max(scores, key=lambda guidance: scores[guidance])
    _, _, images = measure("trained", count, best, SEED)
    measure("held out", count, best, SEED)
    if grid is not None:
        save_grid(images[:128], grid)


def save_grid(images: Tensor, path: Path, columns: int = 16, zoom: int = 2) -> None:
    """Write images side by side, row by row, as one image file.

    Args:
        images: images [B, 3, H, W] in [-1, 1].
        path: file to write; its suffix chooses the format.
        columns: images in a row.
        zoom: factor on width and height.
    """
    rows = math.ceil(len(images) / columns)
    sheet = torch.zeros(rows * columns, *images.shape[1:])
    sheet[: len(images)] = images
    tiled = torch.unflatten(sheet, 0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    image = Image.fromarray(((tiled + 1) * 127.5).round().to(torch.uint8).numpy())
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path)

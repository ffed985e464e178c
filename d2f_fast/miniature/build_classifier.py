"""The stages `classifier` and `evaluate` of `build.py`: the classifier, and what it says of the drawings."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from d2f_fast.evaluation.accuracy import corner_colours, corner_pixels
from d2f_fast.miniature import load_miniature, pictures
from d2f_fast.miniature.build_denoiser import cosine
from d2f_fast.miniature.classifier import WEIGHTS, Classifier, load_classifier

SEED = 0
GUIDANCE_SCALES = (1.5, 2.0, 3.0, 5.0)


@torch.no_grad()
def reconstructions(vae: Any, pairs: Sequence[tuple[int, int]], style: str, seed: int) -> Tensor:
    """Pictures through the autoencoder, mirrored at random: [B, 3, 32, 32] in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    mirrored = (torch.rand(len(pairs), generator=generator) < 0.5).tolist()
    chosen = [pictures.Picture(*pair, mirror) for pair, mirror in zip(pairs, mirrored, strict=True)]
    decoded = []
    for start in tqdm(range(0, len(chosen), 64), desc=style, mininterval=5):
        latents = vae.encode(pictures.draw(chosen[start : start + 64], style)).latent_dist.sample(generator)
        decoded.append(vae.decode(latents).sample.clamp(-1, 1))
    return torch.cat(decoded)


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to two pixels, blur half of the batch, add noise of a random strength."""
    down, right = (torch.randint(5, (2,), generator=generator)).tolist()
    padded = F.pad(pixels, (2, 2, 2, 2), mode="replicate")
    shifted = padded[..., down : down + pictures.SIZE, right : right + pictures.SIZE]
    kernel = torch.tensor([0.25, 0.5, 0.25])
    blurred = F.conv2d(
        F.pad(shifted, (1, 1, 1, 1), mode="replicate"), kernel.outer(kernel).expand(3, 1, 3, 3), groups=3
    )
    share = torch.rand(len(pixels), 1, 1, 1, generator=generator)
    strength = 0.15 * torch.rand(len(pixels), 1, 1, 1, generator=generator)
    noise = torch.randn(shifted.shape, generator=generator)
    return torch.where(share < 0.5, shifted, torch.lerp(shifted, blurred, 2 * share - 1)) + strength * noise


def build_classifier(steps: int, batch: int, learning_rate: float) -> None:
    """Train on clean pictures and on autoencoded ones, both styles; held-out combinations are the test."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    vae = load_miniature().vae
    pairs = itertools.product(range(len(pictures.names())), range(len(pictures.BACKGROUNDS)))
    held_out = sorted(pictures.held_out_pairs())
    # one combination in three: as 3 and 8 have no common divisor, names and colours are all there
    seen = [pair for pair in pairs if pair not in pictures.held_out_pairs()][::3]
    in_second = frozenset(pictures.names_in_both_styles())
    decoded_parts, labels_parts, tests = [], [], {}
    for style_index, style in enumerate(pictures.STYLES):
        shown, test = (
            [pair for pair in group if style_index == 0 or pair[0] in in_second] for group in (seen, held_out)
        )
        decoded_parts.append(reconstructions(vae, shown, style, SEED))
        labels_parts.append(torch.tensor([(name, style_index) for name, _ in shown]))
        tests[style] = (reconstructions(vae, test, style, SEED + 1), torch.tensor([name for name, _ in test]))
    decoded, labels = torch.cat(decoded_parts), torch.cat(labels_parts)
    sprites = torch.stack([pictures.sprites(style) for style in pictures.STYLES])
    palette = torch.tensor(tuple(pictures.BACKGROUNDS.values()))

    classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate, weight_decay=0.05)
    progress = tqdm(range(steps), desc="classifier", mininterval=5)
    for step in progress:
        optimizer.param_groups[0]["lr"] = learning_rate * cosine(step, steps)
        chosen = torch.randint(len(labels), (batch,), generator=generator)
        names, styles = labels[chosen].unbind(-1)
        backgrounds = palette[torch.randint(len(palette), (batch,), generator=generator)]
        clean = pictures.composite(sprites[styles, names], backgrounds)
        through = torch.rand(batch, 1, 1, 1, generator=generator) < 0.6
        flipped = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
        pixels = torch.where(through, decoded[chosen], clean)
        pixels = augment(torch.where(flipped, pixels.flip(-1), pixels), generator)
        features = classifier.features(pixels)
        loss = F.cross_entropy(classifier.name_head(features), names, label_smoothing=0.1)
        style_logits = classifier.style_head(features).squeeze(-1)
        loss = loss + 0.5 * F.binary_cross_entropy_with_logits(style_logits, styles.float())
        loss.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            progress.set_postfix(loss=loss.item())
    half = {key: value.half() if value.is_floating_point() else value for key, value in classifier.state_dict().items()}
    temporary = WEIGHTS.with_suffix(".new")
    save_file(half, temporary)
    temporary.replace(WEIGHTS)
    for style, (pixels, expected) in tests.items():
        ranks = rank(load_classifier(), pixels, expected)
        print(f"autoencoded pictures of held-out combinations, {style}:", rank_line(ranks))


@torch.no_grad()
def rank(classifier: Classifier, pixels: Tensor, names: Tensor) -> Tensor:
    """Place of the right name among the classifier's guesses, 0 the first: [B]."""
    logits = torch.cat([classifier(part) for part in pixels.split(256)])
    return (logits > logits.gather(1, names[:, None])).sum(dim=1)


def rank_line(ranks: Tensor) -> str:
    return f"name first {(ranks < 1).float().mean():.1%}, in the first five {(ranks < 5).float().mean():.1%}"


def names_with_free_corners() -> frozenset[int]:
    """Names whose sprite, in either style, leaves every 2x2 corner transparent: there the background can be read."""
    covered = torch.zeros(len(pictures.names()), dtype=torch.bool)
    for style in pictures.STYLES:
        corners = corner_pixels(pictures.sprites(style)[:, 3:].float())
        covered |= corners.amax(dim=(1, 2)) > 25
    return frozenset((~covered).nonzero().squeeze(-1).tolist())


def background_colours(pixels: Tensor) -> Tensor:
    """Index of the background colour nearest to the corners' median, [B]; `pixels` in [-1, 1]."""
    palette = torch.tensor(tuple(pictures.BACKGROUNDS.values())) / 127.5 - 1
    return corner_colours(pixels, palette)


@torch.no_grad()
def sample(pipe: Any, captions: Sequence[str], guidance: float, steps: int, seed: int, batch: int = 100) -> Tensor:
    """Draw captions by DDIM with guidance, conditional and unconditional in one call: [B, 3, 32, 32] in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    length = pipe.tokenizer.model_max_length
    pixels = []
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
        pixels.append(pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.clamp(-1, 1))
    return torch.cat(pixels)


def evaluate(count: int, steps: int, grid: Path | None) -> None:
    """Print background and name accuracy on trained and held-out combinations, at the best of four guidance scales."""
    pipe, classifier = load_miniature(), load_classifier()
    free = names_with_free_corners()
    pairs = list(itertools.product(range(len(pictures.names())), range(len(pictures.BACKGROUNDS))))
    groups = {
        "trained": [pair for pair in pairs if pair not in pictures.held_out_pairs()],
        "held out": [pair for pair in pairs if pair in pictures.held_out_pairs()],
    }

    def measure(group: str, size: int, guidance: float, seed: int) -> tuple[float, Tensor, Tensor]:
        order = torch.randperm(len(groups[group]), generator=torch.Generator().manual_seed(seed))[:size]
        chosen = [groups[group][i] for i in order]
        pixels = sample(pipe, [pictures.caption(*pair) for pair in chosen], guidance, steps, seed)
        names, colours = torch.tensor(chosen).unbind(-1)
        readable = torch.tensor([name in free for name, _ in chosen])
        background = (background_colours(pixels) == colours)[readable].float().mean().item()
        ranks = rank(classifier, pixels, names)
        line = f"background {background:.1%} of {readable.sum()}, {rank_line(ranks)}"
        print(f"{group}, {len(chosen)} pictures, guidance {guidance}: {line}", flush=True)
        return background, ranks, pixels

    scores = {}
    for guidance in GUIDANCE_SCALES:
        background, ranks, _ = measure("trained", max(100, count // 5), guidance, SEED + 1)
        scores[guidance] = (ranks < 5).float().mean().item() + (ranks < 1).float().mean().item() + background
    best = max(scores, key=lambda guidance: scores[guidance])
    _, _, pixels = measure("trained", count, best, SEED)
    measure("held out", count, best, SEED)
    if grid is not None:
        save_grid(pixels[:128], grid)


def save_grid(pixels: Tensor, path: Path, columns: int = 16, zoom: int = 2) -> None:
    """Write pictures side by side, row by row, as one image file."""
    rows = math.ceil(len(pixels) / columns)
    sheet = torch.zeros(rows * columns, *pixels.shape[1:])
    sheet[: len(pixels)] = pixels
    tiled = sheet.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    image = Image.fromarray(((tiled + 1) * 127.5).round().to(torch.uint8).numpy())
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path)

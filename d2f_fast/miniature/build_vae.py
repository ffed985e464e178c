"""Train the miniature's autoencoder: the stage `vae` of `build.py`."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from d2f_fast.miniature import MINIATURE, emoji
from d2f_fast.miniature.build_denoiser import cosine

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SEED = 0


def random_images(count: int, generator: torch.Generator) -> Tensor:
    """Sample images of both styles, a third of them on a random colour instead of one of the eight backgrounds.

    Args:
        count: number of images.
        generator: source of the random numbers.

    Returns:
        Images [count, 3, 32, 32] in [-1, 1].
    """
    both = torch.tensor(emoji.names_in_both_styles())
    chosen = both[torch.randint(len(both), (count,), generator=generator)]
    second = torch.rand(count, generator=generator) < 0.5
    noto, fluent = (emoji.sprites(style)[chosen] for style in emoji.STYLES)
    rgba = torch.where(second[:, None, None, None], fluent, noto)
    mirrored = torch.rand(count, generator=generator) < 0.5
    rgba = torch.where(mirrored[:, None, None, None], rgba.flip(-1), rgba)
    palette = torch.tensor(tuple(emoji.BACKGROUNDS.values()))
    solid = palette[torch.randint(len(palette), (count,), generator=generator)].float()
    free = torch.rand(count, 3, generator=generator) * 255
    return emoji.composite(rgba, torch.where(torch.rand(count, 1, generator=generator) < 1 / 3, free, solid))


def new_vae() -> "AutoencoderKL":
    """Make an untrained autoencoder with latents of 4 channels and an eighth of the images' pixels along each side."""
    from diffusers import AutoencoderKL

    levels = (32, 64, 96)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(levels),
        up_block_types=("UpDecoderBlock2D",) * len(levels),
        block_out_channels=levels,
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=4,
        sample_size=emoji.SIZE,
    )


def build_vae(steps: int, batch: int, save_every: int = 2000) -> None:
    """Train the autoencoder in bfloat16 autocast, and save its averaged weights.

    The loss is the absolute error of the pixels and of their differences to the neighbouring pixels, with a small
    weight on the KL divergence.

    Args:
        steps: number of training steps.
        batch: images in a step.
        save_every: steps between two saves.
    """
    from diffusers.training_utils import EMAModel

    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    vae = new_vae()
    ema = EMAModel(vae.parameters(), decay=0.999)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    progress = tqdm(range(steps), desc="vae", mininterval=5)
    for step in progress:
        optimizer.param_groups[0]["lr"] = 2e-3 * cosine(step, steps)
        images = random_images(batch, generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample
        difference = decoded.float() - images
        loss_pixels = difference.abs().mean()
        loss_edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        loss_kl = posterior.kl().float().mean() / (4 * 8 * 8)
        torch.autograd.backward(loss_pixels + loss_edges + 1e-3 * loss_kl)
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(vae.parameters())
        if step % 50 == 0:
            deviation = posterior.mean.std() / posterior.std.mean()
            progress.set_postfix(l1=loss_pixels.item(), mse=difference.square().mean().item(), snr=deviation.item())
        if (step + 1) % save_every == 0 or step + 1 == steps:
            ema.store(vae.parameters())
            ema.copy_to(vae.parameters())
            save_vae(vae)
            ema.restore(vae.parameters())


@torch.no_grad()
def save_vae(vae: "AutoencoderKL") -> None:
    """Save the autoencoder in float16, with the scaling factor that gives its latents a standard deviation of 1."""
    items = [emoji.Emoji(i, i % len(emoji.BACKGROUNDS)) for i in emoji.names_in_both_styles()]
    latents = torch.cat([vae.encode(emoji.render(items, style)).latent_dist.mean for style in emoji.STYLES])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    # A deep copy keeps the scaling factor; `from_config` would drop it, because it is listed among the defaults.
    copy.deepcopy(vae).half().save_pretrained(MINIATURE / "vae")

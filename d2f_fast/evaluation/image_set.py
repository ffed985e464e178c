"""Compute the features of many images, from files or generated for prompts, without holding the images in memory."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from d2f_fast.data.image_headers import reason_of
from d2f_fast.data.images import preprocess, read_image, to_rgb
from d2f_fast.errors import DatasetError, printable
from d2f_fast.sampling.generate import generate

if TYPE_CHECKING:
    from d2f_fast.sampling.generate import Pipeline

Features = NDArray[np.float32]


@dataclass(frozen=True)
class FeatureNetwork:
    """A network in whose features images are compared.

    Args:
        features: function of images [B, 3, side, side] in [-1, 1] on the device, which returns features [B, F].
        side: width and height in pixels to which images are brought.
        device: device of the network.
    """

    features: Callable[[Tensor], Tensor]
    side: int
    device: torch.device


@torch.no_grad()
def compute_features(images: Iterable[Tensor], network: FeatureNetwork, batch_size: int = 64) -> Features:
    """Compute the features of images, a batch at a time.

    Args:
        images: images [3, side, side] in [-1, 1], as `square` returns them; each is asked for once.
        network: network that computes the features.
        batch_size: number of images that the network is given at once.

    Returns:
        Features [N, F] float32, in the order of the images.
    """
    remaining = iter(images)
    parts = []
    while batch := list(itertools.islice(remaining, batch_size)):
        parts.append(network.features(torch.stack(batch).to(network.device)).float().cpu().numpy())
    return np.concatenate(parts)


def square(image: Image.Image, side: int) -> Tensor:
    """Return the middle square of an image, resized with Lanczos, as a tensor [3, side, side] in [-1, 1].

    Args:
        image: image of any mode and size; an image of `side` pixels square keeps its pixels.
        side: width and height in pixels.

    Raises:
        ValueError: The image is floating point, has values outside 0 … 65535, or is too elongated.
    """
    return preprocess(to_rgb(image), side, center_crop=True, flip=False)


def read_squares(paths: Sequence[Path], side: int, label: str) -> Iterator[Tensor]:
    """Yield the middle square of each image file, and show a progress bar.

    Args:
        paths: image files.
        side: width and height of the squares in pixels.
        label: text at the left of the progress bar.

    Raises:
        DatasetError: A file does not decode, or its image cannot be used; the message names it.
    """
    for path in tqdm(paths, desc=label, unit="image", dynamic_ncols=True):
        image = read_image(path)
        try:
            yield square(image, side)
        except ValueError as error:
            raise DatasetError(f"{printable(path)} cannot be used ({reason_of(error)}): replace it") from error


def generate_squares(
    pipeline: "Pipeline", prompts: Sequence[str], seed: int, batch_size: int, side: int, **options: Any
) -> Iterator[Tensor]:
    """Yield the middle square of one generated image for each prompt, and show a progress bar.

    The noise of an image depends on the seed and on its position alone, so that the batch size does not change it.

    Args:
        pipeline: Stable Diffusion or SDXL pipeline on its device.
        prompts: prompts.
        seed: seed of all noise.
        batch_size: number of images that are generated at once.
        side: width and height of the squares in pixels.
        options: further arguments of `generate`.

    Raises:
        RefusedInputError: `generate` refuses an option.
    """
    with tqdm(total=len(prompts), desc="generated images", unit="image", dynamic_ncols=True) as bar:
        for first in range(0, len(prompts), batch_size):
            part = prompts[first : first + batch_size]
            noise = [noise_generator(seed, first + position) for position in range(len(part))]
            for image in generate(pipeline, part, generator=noise, **options):
                yield square(image, side)
            bar.update(len(part))


def noise_generator(seed: int, position: int) -> torch.Generator:
    """Return the source of the noise of one image or path, on the CPU.

    Args:
        seed: seed of the whole set, from 0 on; other seeds share no noise with it.
        position: position of the image or path in the set, from 0 on.
    """
    state = int(np.random.SeedSequence([seed, position]).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state >> 1)

"""Images that a run generates while it trains: files, trackers, and the thumbnail of a LoRA file."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from d2f_fast.files.atomic import atomic_path, make_folder

FOLDER = "validation"
THUMBNAIL_SIDE = 256


def write_validation_images(images: Sequence[Image.Image], output: str, step: int) -> None:
    """Write the images of a step to `validation/step-000100_0.png` and so on.

    Args:
        images: one image for each validation prompt.
        output: output folder of the run.
        step: number of steps taken.

    Raises:
        RefusedInputError: the disk is full, or the folder cannot be made.
    """
    folder = make_folder(Path(output) / FOLDER)
    for position, image in enumerate(images):
        with atomic_path(folder / f"step-{step:06d}_{position}.png") as temporary:
            image.save(temporary, format="PNG")


def log_validation_images(accelerator: Accelerator, images: Sequence[Image.Image], step: int) -> None:
    """Send the images of a step to TensorBoard or Weights & Biases, where the run reports to one of them.

    Args:
        accelerator: accelerator of the run, with its trackers.
        images: images of equal size.
        step: number of steps taken.
    """
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            pixels = np.stack([np.asarray(image) for image in images])
            tracker.log_images({FOLDER: pixels}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({FOLDER: list(images)}, step=step)


def thumbnail(image: Image.Image) -> str:
    """Return an image as a data URL of a JPEG of at most 256 x 256 pixels, as `modelspec.thumbnail` has it.

    Args:
        image: RGB image.
    """
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"

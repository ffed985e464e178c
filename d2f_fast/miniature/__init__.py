"""The embedded miniature Stable Diffusion: weights, captioned pictures, and how both were made."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

MINIATURE = Path(__file__).parent / "pipeline"


def load_miniature(**kwargs: Any) -> "StableDiffusionPipeline":
    """Load the miniature as a stock pipeline, from the package's own folder: no network.

    Args:
        kwargs: passed to `StableDiffusionPipeline.from_pretrained`; `dtype` is float32 unless given.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    kwargs.setdefault("dtype", torch.float32)
    return StableDiffusionPipeline.from_pretrained(MINIATURE, local_files_only=True, **kwargs)

"""Load the embedded miniature Stable Diffusion.

The folder also holds its captioned images (`emoji`), a classifier of them, a reflow LoRA, and the scripts that made all
of this (`build` and the files it uses).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

MINIATURE = Path(__file__).parent / "pipeline"
REFLOW_LORA = Path(__file__).parent / "reflow.safetensors"


def load_miniature(**kwargs: Any) -> "StableDiffusionPipeline":
    """Load the miniature as a stock diffusers pipeline from the package's own folder, without a network.

    Args:
        kwargs: options of `StableDiffusionPipeline.from_pretrained`; `dtype` is float32 by default.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    kwargs.setdefault("dtype", torch.float32)
    return StableDiffusionPipeline.from_pretrained(MINIATURE, local_files_only=True, **kwargs)

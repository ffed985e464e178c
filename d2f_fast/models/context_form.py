"""How the network of a pipeline takes the latents of images beside its own. Imports no torch."""

from typing import NamedTuple


class ContextForm(NamedTuple):
    """Where the latents of images come in a network's input, and in which scale.

    Attributes:
        first: Whether they come before the network's own latents along the channels, and not after them.
        scaled: Whether they are multiplied by the scaling factor of the autoencoder, as the network's own latents are.
    """

    first: bool
    scaled: bool


def context_form(pipeline_class: str, cosxl: bool = False) -> ContextForm:
    """Return how the network of a pipeline takes images.

    diffusers' pipelines of InstructPix2Pix put unscaled latents of the image behind the noisy ones. Marigold's put
    scaled ones before them, and so does the training of this package.

    Args:
        pipeline_class: Name of the pipeline's class in diffusers.
        cosxl: Entry `is_cosxl_edit` of the pipeline's configuration, with which the latents are scaled.
    """
    if pipeline_class.endswith("InstructPix2PixPipeline"):
        return ContextForm(first=False, scaled=cosxl)
    return ContextForm(first=True, scaled=True)

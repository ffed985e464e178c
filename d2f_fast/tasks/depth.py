"""Predict the depth of images with a network that was trained on it, and measure the predictions.

diffusers' own `MarigoldDepthPipeline` does the work: it resizes and pads the image, integrates from noise (or from
zeros, for a network that was trained so) to the latents of the depth, averages the three decoded channels, and combines
several predictions. So the depth is the one that every program gets from the saved folder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from diffusers import MarigoldDepthPipeline
from diffusers.pipelines.marigold.marigold_image_processing import MarigoldImageProcessor
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from d2f_fast.data.depth_options import DepthNormalization
from d2f_fast.errors import DatasetError, RefusedInputError
from d2f_fast.evaluation.depth import DepthErrors, align_depth, depth_errors
from d2f_fast.lora.tags import starts_from_zeros
from d2f_fast.models.depth_start import start_tags
from d2f_fast.sampling.options import check_jump
from d2f_fast.sampling.scheduler import Diff2FlowScheduler

if TYPE_CHECKING:
    from d2f_fast.data.depth_source import DepthSource

DepthSampler = Literal["saved", "flow"]


class DepthPrediction(NamedTuple):
    """Predicted depth of one image.

    Attributes:
        values: Depth up to a scale and a shift, [H, W] float32 in [0, 1]; near is 0, and 1 for disparity.
        uncertainty: Spread of several predictions at each pixel, [H, W] float32; None for a single one.
    """

    values: NDArray[np.float32]
    uncertainty: NDArray[np.float32] | None


@dataclass(frozen=True)
class DepthModel:
    """A network that predicts depth, and how it is sampled.

    Args:
        pipeline: Stock pipeline on its device.
        normalization: Normalisation that it was trained with, which says what its values are affine in.
        flow_options: Options of `Diff2FlowScheduler` that the files of the model state, such as the shift.
    """

    pipeline: MarigoldDepthPipeline
    normalization: DepthNormalization
    flow_options: dict[str, Any]

    @property
    def starts_from_zeros(self) -> bool:
        """Return whether the network states that it jumps from zeros, in place of noise, to the depth in one step."""
        return starts_from_zeros(start_tags(self.pipeline.unet.config))

    def sampled_by(self, sampler: DepthSampler) -> "DepthModel":
        """Return the model with a sampler.

        Args:
            sampler: "saved" keeps the scheduler of the pipeline; "flow" steps evenly in flow time from t = 0. A model
                that starts from zeros always takes "flow", because a saved scheduler may start just after t = 0.

        Raises:
            RefusedInputError: The configuration of the scheduler cannot be used for the flow.
        """
        if sampler == "flow" or self.starts_from_zeros:
            try:
                scheduler = Diff2FlowScheduler.from_config(self.pipeline.scheduler.config, **self.flow_options)
            except ValueError as error:
                raise RefusedInputError(str(error)) from error
            self.pipeline.register_modules(scheduler=scheduler)
        return self

    def predict(
        self,
        image: Image.Image,
        *,
        name: str = "the image",
        steps: int | None = None,
        ensemble_size: int = 1,
        processing_resolution: int | None = None,
        seed: int = 0,
    ) -> DepthPrediction:
        """Predict the depth of an image. It depends on no other image: each starts from the noise of the seed.

        Args:
            image: RGB image.
            name: Name of the image in messages.
            steps: Number of sampling steps, at least 1; None for the model's own. A model that starts from zeros takes
                one step.
            ensemble_size: Number of predictions from different noise that are aligned and combined; 1 for a single one.
            processing_resolution: Longer side at which the image is processed, in pixels; 0 for the image's own size,
                and None for the model's own.
            seed: Seed of the noise, which a model that starts from zeros does without.

        Raises:
            RefusedInputError: The processing resolution is not a multiple of the size of a latent, or the model starts
                from zeros and there are several steps or predictions.
            DatasetError: The image would be too small for the network.
        """
        self._check_size(image, name, processing_resolution)
        start: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed)}
        if self.starts_from_zeros:
            check_jump(self.pipeline.name_or_path or "the model", "steps", steps, ensemble_size)
            steps, start = 1, {"latents": self._zeros(image, processing_resolution)}
        found = self.pipeline(
            image,
            num_inference_steps=steps,
            ensemble_size=ensemble_size,
            processing_resolution=processing_resolution,
            output_uncertainty=ensemble_size > 1,
            **start,
        )
        uncertainty = None if found.uncertainty is None else found.uncertainty[0, ..., 0]
        return DepthPrediction(found.prediction[0, ..., 0], uncertainty)

    def _longer_side(self, processing_resolution: int | None) -> int:
        """Return the longer side in pixels at which images are processed; 0 for that of each image."""
        own = self.pipeline.config.default_processing_resolution
        return processing_resolution if processing_resolution is not None else own or 0

    def _zeros(self, image: Image.Image, processing_resolution: int | None) -> Tensor:
        """Return zeros of the shape of the latents of a processed image, [1, C, h, w]."""
        longer = self._longer_side(processing_resolution) or max(image.size)
        width, height = (side * longer // max(image.size) for side in image.size)
        latent, unet = self.pipeline.vae_scale_factor, self.pipeline.unet
        shape = 1, self.pipeline.vae.config.latent_channels, -(-height // latent), -(-width // latent)
        return torch.zeros(shape, dtype=unet.dtype, device=unet.device)

    def _check_size(self, image: Image.Image, name: str, processing_resolution: int | None) -> None:
        """Refuse an image that the network cannot take at a processing resolution."""
        longer, latent = self._longer_side(processing_resolution), self.pipeline.vae_scale_factor
        if longer % latent:
            raise RefusedInputError(f"processing_resolution must be a multiple of {latent}, got {longer}")
        least = latent << (len(self.pipeline.unet.config.block_out_channels) - 1)
        shorter = min(image.size) * longer // max(image.size) if longer else min(image.size)
        if shorter < least:
            raise DatasetError(
                f"{name}: {image.width}x{image.height} pixels are too small: the shorter side is processed at {shorter}"
                f" pixels, and the network needs {least}; give a larger image or --processing_resolution, or crop the"
                " longer side"
            )


def colour_preview(prediction: DepthPrediction) -> Image.Image:
    """Return the values in colours of 8 bits, from red (0) over yellow to blue (1), as Marigold shows them.

    Args:
        prediction: Predicted depth.
    """
    (preview,) = MarigoldImageProcessor.visualize_depth([prediction.values])
    shown: Image.Image = preview
    return shown


def depth_png(prediction: DepthPrediction) -> Image.Image:
    """Return the values as an image of 16 bits, 0 … 65535.

    Args:
        prediction: Predicted depth.
    """
    return Image.fromarray((prediction.values.astype(np.float64) * 65535).round().astype(np.uint16))


def measure_depth(
    model: DepthModel, images: "DepthSource", count: int, progress: Callable[[int], object], **options: Any
) -> list[DepthErrors]:
    """Predict the depth of images, and return the errors of each.

    Args:
        model: Network that predicts depth.
        images: Images with their true depth, of which the first ones are taken.
        count: Number of images.
        progress: Function that is called with the number of images that are done.
        options: Options of `DepthModel.predict`.

    Raises:
        DatasetError: An image or its depth cannot be used, or is too small for the network.
        RefusedInputError: An option does not go with the model; see `DepthModel.predict`.
    """
    errors = []
    for number in range(count):
        sample = images[number]
        prediction = model.predict(sample.image, name=sample.name, **options)
        aligned = align_depth(
            *(prediction.values, sample.depth, sample.valid, model.normalization),
            least=images.least,
            most=images.most,
            fit_side=images.fit_side,
        )
        errors.append(depth_errors(aligned, sample.depth, sample.valid))
        progress(number + 1)
    return errors

"""Options of predicting depth that `d2f sample --task depth` and `d2f evaluate --task depth` share.

This module imports torch only where a model is loaded, so that the help answers at once.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from d2f_fast.commands.checks import check_lora_and_output
from d2f_fast.commands.depth_checks import check_depth_model, check_ensemble, depth_tags
from d2f_fast.config import MAX_SIDE, at_least, check_options, check_seed, option
from d2f_fast.lora.tags import starts_from_zeros
from d2f_fast.models.options import ModelOptions
from d2f_fast.sampling.options import check_jump

if TYPE_CHECKING:
    from d2f_fast.tasks.depth import DepthModel

MAX_ENSEMBLE = 1000


@dataclass(frozen=True)
class DepthSampling:
    """Hold the model that predicts depth, and the options of its prediction.

    Args:
        model: Model that predicts depth: the folder `pipeline` of a run of `d2f train --task depth`, or a Marigold
            folder or Hugging Face id; or, together with --lora, the text-to-image model that the LoRA was trained on.
        lora: LoRA of `d2f train --task depth` that are merged into the model, each as PATH or PATH:SCALE. Default:
            none.
        num_inference_steps: Number of sampling steps, each of which evaluates the network once. With --sampler saved,
            take one that divides 1000, because diffusers' scheduler is inexact for others. Default: the number saved
            with the model, which is 4 after `d2f train`, and 1, the only one possible, after `d2f train --distill`.
        seed: Seed of the noise, and of the 95 % intervals of `d2f evaluate`. Every image starts from the same noise, so
            that its depth does not depend on the other images. After `d2f train --distill` it starts from zeros.
        model_options: Options of the base model.
        sampler: Times of the sampling steps. "saved" takes the scheduler saved with the model, which gives the depth
            that other programs get. "flow" takes even steps in flow time, as `d2f sample` does for images, and is what
            a model takes after `d2f train --distill`.
        ensemble_size: Number of predictions from different noise that are combined into one, which takes that many
            times as long. From 2 on, SciPy is needed, and `d2f sample` writes their spread as NAME_uncertainty.npy.
            Only 1 after `d2f train --distill`, because all predictions are then equal.
        processing_resolution: Longer side in pixels that an image is scaled to for the prediction; the depth is scaled
            back. 0 keeps the size of the image. Default: that of the protocol for a data set of `d2f evaluate` that has
            one (docs/depth.md), else that of the model.
    """

    model: str = field(metadata={"group": "essential", "metavar": "MODEL"})
    lora: tuple[str, ...] = option("essential", (), metavar="PATH[:SCALE]")
    num_inference_steps: int | None = option("essential", None, at_least(1, 1000))
    seed: int = option("essential", 0, check_seed)
    model_options: ModelOptions = field(default_factory=ModelOptions)
    sampler: Literal["saved", "flow"] = option("sampling", "saved")
    ensemble_size: int = option("sampling", 1, at_least(1, MAX_ENSEMBLE))
    processing_resolution: int | None = option("image", None, at_least(0, MAX_SIDE))

    def __post_init__(self) -> None:
        """Refuse values that an option does not take."""
        check_options(self)

    def check(self, output_dir: str) -> None:
        """Refuse, before the slow imports, a model, LoRA or output folder that cannot be used.

        Args:
            output_dir: Output folder, which is not made here.

        Raises:
            RefusedInputError: The model or a LoRA cannot be used or predicts no depth, SciPy is needed and missing, the
                model starts from zeros and there are several steps or predictions, or the output folder is a file.
        """
        check_ensemble(self.ensemble_size)
        check_depth_model(self.model, self.lora, self.model_options)
        if starts_from_zeros(depth_tags(self.model, self.lora)):
            self._check_jump()
        check_lora_and_output(self.lora, output_dir, model=self.model, options=self.model_options, images=1)

    def load(self) -> "DepthModel":
        """Load the model, onto the GPU where there is one.

        Raises:
            RefusedInputError: The model or a LoRA cannot be used or predicts no depth, or the model starts from zeros
                and there are several steps or predictions.
        """
        from d2f_fast.commands.depth_model import load_depth_model

        model = load_depth_model(self.model, self.lora, self.model_options, self.sampler)
        if model.starts_from_zeros:
            self._check_jump()  # A hub id says only now how it starts.
        return model

    def _check_jump(self) -> None:
        """Refuse options that do not go with a model that starts from zeros."""
        named = " with ".join((self.model, *self.lora))
        check_jump(named, "num_inference_steps", self.num_inference_steps, self.ensemble_size)

    @property
    def of_prediction(self) -> dict[str, Any]:
        """Return the options of `DepthModel.predict`, by its names."""
        return {
            "steps": self.num_inference_steps,
            "ensemble_size": self.ensemble_size,
            "processing_resolution": self.processing_resolution,
            "seed": self.seed,
        }

    def row(self, model: "DepthModel") -> dict[str, Any]:
        """Return how the depth was predicted, as metrics.json records it.

        Args:
            model: Model that `load` returned.
        """
        return {
            "task": "depth",
            "sampler": "flow" if model.starts_from_zeros else self.sampler,
            "start": "zeros" if model.starts_from_zeros else "noise",
            "steps": self.num_inference_steps or model.pipeline.default_denoising_steps,
            "ensemble_size": self.ensemble_size,
            "normalization": model.normalization,
            "seed": self.seed,
            "model": self.model,
            "lora": list(self.lora),
        }

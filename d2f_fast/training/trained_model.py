"""The result of a run: the averaged weights, which generate images and are saved."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from d2f_fast.config import SamplingMethod, Spacing, TrainingConfig
from d2f_fast.data.depth_encoding import DepthDataset
from d2f_fast.data.pair_checks import size_of_pairs
from d2f_fast.data.pairs import PairDataset
from d2f_fast.data.source_images import SourceTargetDataset
from d2f_fast.errors import RefusedInputError
from d2f_fast.flow.alignment import Alignment
from d2f_fast.image_sizes import first_size, size_text
from d2f_fast.layers.half_base import HalfBase
from d2f_fast.lora.tags import starts_from_image, starts_from_zeros
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.solve import OnState, Sampling, generate_images, invert_images
from d2f_fast.sampling.solver_options import SolverOptions, check_method_of_source
from d2f_fast.training.batches import TrainingData
from d2f_fast.training.ema import EMA
from d2f_fast.training.network import inputs_in_float32
from d2f_fast.training.objective import Objective
from d2f_fast.training.publish import publish_lora, publish_pipeline, tags_of
from d2f_fast.training.summary import depth_tags, pair_tags, source_tags
from d2f_fast.training.teacher import TeacherModel

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class TrainedModel(ABC):
    """Generate images with the averaged weights of a run, and save them.

    Attributes:
        model: base model, whose UNet is the trained network.
        unet: the network.
        config: options of the run.
        objective: objective that the network is trained on.
        teacher: teacher whose velocity is learned; None where it is that of the data.
        ema: average of the trained parameters; None where `ema_decay` is 0.
        tags: entries of a file's header that describe the result and how to sample it.
        global_step: number of optimizer steps taken.
        thumbnail: last image of the first validation prompt, as `modelspec.thumbnail` has it; None for none.
    """

    model: BaseModel
    unet: "UNet2DConditionModel"
    config: TrainingConfig
    objective: Objective
    teacher: TeacherModel | None
    ema: EMA | None
    tags: dict[str, str]
    global_step: int
    thumbnail: str | None
    _half_base: HalfBase | None

    @property
    @abstractmethod
    def global_batch_size(self) -> int:
        """Number of images per step, over all processes and backward passes."""

    @property
    def alignment(self) -> Alignment:
        """Alignment of the base model, on the device; see `BaseModel.alignment`."""
        return self.model.alignment

    @contextmanager
    def averaged(self, *, exact_base: bool = True) -> Iterator[None]:
        """Hold the averaged weights and the exact frozen ones inside a `with` block, in evaluation mode.

        Args:
            exact_base: whether the frozen weights are exact; False leaves them in the type of the training.
        """
        exact = nullcontext() if self._half_base is None or not exact_base else self._half_base.exact()
        average = nullcontext() if self.ema is None else self.ema.swapped()
        self.unet.eval()
        try:
            with exact, average:
                yield
        finally:
            self.unet.train()

    def sample(
        self,
        prompts: str | Sequence[str],
        num_inference_steps: int = 4,
        guidance_scale: float = 1.0,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | None = None,
        method: SamplingMethod = "euler",
        solver: SolverOptions | None = None,
        on_state: OnState | None = None,
        context: Tensor | None = None,
        image_guidance_scale: float = 1.0,
        noise: Tensor | None = None,
    ) -> list[Image.Image]:
        """Generate one image for each prompt with the averaged weights, along flow time from t = 0.

        Args:
            prompts: one prompt, or several.
            num_inference_steps: number of integration steps, at least 1; "midpoint" and "heun" need 2.
            guidance_scale: scale of classifier-free guidance; 1 and 0 turn it off, other values below 1 are refused.
            negative_prompt: prompt to steer away from, with guidance; "" for the model's own empty prompt.
            height, width: size of the images in pixels; None for the size that was trained, the first of
                several.
            generator: source of the noise, on the device or the CPU; None for torch's global generator.
            method: integration method.
            solver: options of the method, and the interval of guidance; None for the defaults.
            on_state: function that is called with the number, the flow time and the images of each state on the way;
                None for none.
            context: latents of the k images that the network sees, [B, k · C, h, w], as a batch of the training has
                them; see `encode_context`. None for a network that sees none.
            image_guidance_scale: scale of the guidance by these images, at least 1, which turns it off.
            noise: flow state at t = 0 in place of random noise, [B, C, h, w], such as `start_of_flow` makes of source
                images; None for random noise. A model that was trained on source images needs it. One that was trained
                to jump from zeros starts from zeros, and takes none.

        Returns:
            One RGB image for each prompt.

        Raises:
            RefusedInputError: the autoencoder has no latents of this height or width, the steps cannot be used, the
                network takes another context, the flow starts from an image and `noise` is missing, or `method` adds
                noise, or the network was trained to jump from zeros and would not do so in one step of "euler".
        """
        if starts_from_image(self.tags):
            if noise is None:
                raise RefusedInputError(
                    "the model was trained to start from an image: give noise=start_of_flow(model, images, height,"
                    " width, source_noise)"
                )
            check_method_of_source(method)
        if starts_from_zeros(self.tags):
            if noise is not None or (num_inference_steps, method) != (1, "euler"):
                raise RefusedInputError(
                    "the model was trained to jump from zeros in one step: give num_inference_steps=1, and leave method"
                    " and noise out"
                )
            noise = None if context is None else torch.zeros_like(context[:, : self.unet.config.out_channels])
        sampling = self._sampling(method, solver, num_inference_steps, guidance_scale, negative_prompt, height, width)
        sampling = replace(sampling, image_guidance_scale=image_guidance_scale)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        with self._generating():
            return generate_images(self.model, prompts, sampling, generator, noise, on_state, context)

    def invert(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        method: SamplingMethod = "rk4",
        solver: SolverOptions | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Return the noise [B, C, h, w] that images come from, along the flow of the averaged weights.

        Args:
            images: B images of mode RGB. Each is resized and cropped in the middle to the size.
            prompts: their B prompts.
            num_inference_steps, guidance_scale, height, width, method, solver, context: as for `sample`.

        Raises:
            RefusedInputError: the autoencoder has no latents of this height or width, the method adds noise, or the
                network was trained to jump from zeros, so that no times between are trained.
        """
        if starts_from_zeros(self.tags):
            raise RefusedInputError(
                "the model was trained to jump from zeros in one step, and no path leads back from an image: use sample"
            )
        sampling = self._sampling(method, solver, num_inference_steps, guidance_scale, "", height, width)
        with self._generating():
            return invert_images(self.model, images, prompts, sampling, context)[0]

    @contextmanager
    def _generating(self) -> Iterator[None]:
        """Hold the averaged weights inside a `with` block, and feed the network its own type."""
        cast = inputs_in_float32(self.unet) if self.config.adapter == "full" else nullcontext()
        with self.averaged(), cast:
            yield

    def _sampling(
        self,
        method: SamplingMethod,
        solver: SolverOptions | None,
        steps: int,
        guidance_scale: float,
        negative_prompt: str,
        height: int | None,
        width: int | None,
    ) -> Sampling:
        """Return how images are generated, with the size, shift and prediction type of the run."""
        config = self.config
        scheduler_options: dict[str, Any] = {"shift": config.recommended_shift}
        if config.objective == "fm":
            scheduler_options |= {"prediction_type": "flow_prediction", "fm_form": config.fm_form}
        own_size = first_size(self.tags["d2f.resolution"])
        size = height or own_size.height, width or own_size.width
        own = solver or SolverOptions()
        spacing: Spacing = "uniform"
        return Sampling(method, own, steps, guidance_scale, negative_prompt, *size, spacing, scheduler_options)

    def save_lora(self, folder: str | Path) -> Path:
        """Write the averaged adapter to the LoRA files of `lora_format`; see `publish_lora`."""
        run = self.global_step, self.global_batch_size
        with self.averaged(exact_base=False):
            tags = self.tags | ({} if self.thumbnail is None else {"modelspec.thumbnail": self.thumbnail})
            return publish_lora(self.model, self.objective, self.config, tags, folder, *run)

    def save_pipeline(self, folder: str | Path, *, replace: bool = False) -> Path:
        """Write the averaged model as a diffusers pipeline, and return its folder; see `publish_pipeline`."""
        with self.averaged():
            return publish_pipeline(self.model, self.objective, self.config, self.tags, folder, replace=replace)

    def _tags(self, dataset: TrainingData | None = None) -> dict[str, str]:
        """Return the entries of a file's header that describe the result, once the data is known with those of it."""
        taught = {} if self.teacher is None else self.teacher.tags()
        of_data: dict[str, str] = {}
        if isinstance(dataset, PairDataset):
            of_data = pair_tags(dataset, taught=bool(taught), distilled=self.config.distill)
            # The resolution of the run may be their shorter side alone.
            size = size_of_pairs(dataset, self.model.downsampling)
            of_data["d2f.resolution"] = size_text(size.height if size.height == size.width else size)
        elif isinstance(dataset, DepthDataset):
            of_data = depth_tags(dataset, distilled=self.config.distill)
        elif isinstance(dataset, SourceTargetDataset):
            of_data = source_tags(dataset)
        return tags_of(self.config, self.objective, self.model, of_data | taught)

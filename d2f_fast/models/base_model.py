"""The base model: a pretrained diffusers pipeline that encodes images and captions, and decodes latents."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from d2f_fast.errors import ModelError, RefusedInputError
from d2f_fast.flow.alignment import Alignment
from d2f_fast.flow.flow import Flow
from d2f_fast.flow.naive_flow import NaiveFlow
from d2f_fast.flow.scheduler_config import predicts_flow
from d2f_fast.models.autoencoder import posterior_of, prepare_autoencoder
from d2f_fast.models.configs import downsampling_of, resolution_of
from d2f_fast.models.conv_in import widen_conv_in
from d2f_fast.models.facts import ModelFacts, state_facts
from d2f_fast.models.load import load_model
from d2f_fast.models.options import ModelOptions

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from transformers import PreTrainedTokenizerBase

    from d2f_fast.lora.start import StartingLora

# Components of a pipeline on which the encoding of a prompt depends; a pipeline may lack some.
TEXT_COMPONENTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


class BaseModel:
    """A diffusers text-to-image pipeline and its parts, with frozen weights.

    Args:
        pipeline: StableDiffusionPipeline, StableDiffusionXLPipeline, or another with the same components and
            `encode_prompt`.
        options: Options of the base model. Those that replace entries of the scheduler's configuration replace the
            pipeline's scheduler; None changes nothing.
        facts: What the model is taken for, where `load_model` has found it and applied the options; None reads it from
            the pipeline.

    Attributes:
        pipeline: The pipeline itself.
        options: Options of the base model.
        facts: What the model is taken for.
        unet: Its network.
        vae: Its autoencoder.
        flow: Map between flow time and the network's own time and output: an `Alignment` of a diffusion model, or a
            `NaiveFlow` where the network predicts the flow itself.
        starting_lora: LoRA file that the adapter in the UNet started from, whose part of the text encoders is merged
            into them; None where there is none.
        unet_as_stored: Whether the UNet may hold half-precision weights that the run must first prepare.

    Raises:
        ModelError: The pipeline has no UNet2DConditionModel, or its scheduler cannot be aligned.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, options: ModelOptions | None = None, facts: ModelFacts | None = None
    ) -> None:
        self.pipeline = pipeline
        self.options = options or ModelOptions()
        if type(getattr(pipeline, "unet", None)).__name__ != "UNet2DConditionModel":
            raise ModelError(f"{type(pipeline).__name__} has no UNet2DConditionModel: give a Stable Diffusion pipeline")
        self.unet: UNet2DConditionModel = pipeline.unet
        if facts is None and pipeline.vae is not None:
            prepare_autoencoder(pipeline, self.options, pipeline.vae.dtype)
        self.vae: AutoencoderKL = pipeline.vae
        self.facts = facts or state_facts(pipeline, self.options, "the pipeline's scheduler")
        self.flow = flow_of_scheduler(pipeline.scheduler)
        if self.flow.prediction_type != self.facts.prediction_type:
            raise ModelError(
                f"{type(pipeline.scheduler).__name__} serves only {self.flow.prediction_type}, and --prediction_type"
                f" says {self.facts.prediction_type}: leave the option out, or give a folder with another scheduler"
            )
        self.starting_lora: StartingLora | None = None
        self.unet_as_stored = False
        for component in self._frozen():
            component.requires_grad_(False).eval()

    @classmethod
    def load(
        cls,
        model: str | Path,
        dtype: torch.dtype = torch.float32,
        options: ModelOptions | None = None,
        *,
        unet_as_stored: bool = False,
    ) -> "BaseModel":
        """Load a base model.

        Args:
            model: Hub id, pipeline folder, `.safetensors` file with every part, or "miniature" for the embedded
                miniature.
            dtype: Type of the weights.
            options: Options of the base model; None for the defaults.
            unet_as_stored: Whether the UNet keeps its weights in half precision where its file has them so.

        Raises:
            ModelError: The model cannot be loaded, has no UNet2DConditionModel, or its scheduler cannot be aligned; the
                message names the file.
        """
        pipeline, facts = load_model(model, dtype, options, unet_as_stored=unet_as_stored)
        try:
            loaded = cls(pipeline, options, facts)
        except ModelError as error:
            raise ModelError(f"{model}: {error}") from error
        loaded.unet_as_stored = unet_as_stored
        return loaded

    @property
    def alignment(self) -> Alignment:
        """Return the flow of a diffusion model.

        Raises:
            ModelError: The network predicts the flow itself, so that there is nothing to align.
        """
        if not isinstance(self.flow, Alignment):
            raise ModelError("the network predicts the flow itself (flow_prediction) and has no alignment: use flow")
        return self.flow

    @property
    def device(self) -> torch.device:
        """Return the device of the UNet."""
        return _device_and_dtype(self.unet)[0]

    @property
    def downsampling(self) -> int:
        """Return the number of pixels along each side of one latent."""
        return downsampling_of(self.vae.config)

    @property
    def resolution(self) -> int:
        """Return the side of the images that the model was made for, in pixels; the shorter one where they differ.

        Raises:
            RefusedInputError: The configuration of the UNet does not say it.
        """
        return resolution_of(self.unet.config, self.downsampling)

    @property
    def stated_resolution(self) -> int | None:
        """Return the same; None where the configuration does not say it."""
        try:
            return self.resolution
        except RefusedInputError:
            return None

    def latents_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape [C, h, w] of the latents of images of a size in pixels."""
        return int(self.unet.config.out_channels), height // self.downsampling, width // self.downsampling

    @property
    def context_images(self) -> int:
        """Return the number of images whose latents the network takes beside its own; 0 for text-to-image."""
        return int(self.unet.config.in_channels // self.unet.config.out_channels) - 1

    def see_images(self, images: int = 1) -> None:
        """Let the network take the latents of images beside its own; one that takes as many already stays as it is.

        Args:
            images: Number of images, at least 1.

        Raises:
            ModelError: The network takes other inputs; see `widen_conv_in`.
        """
        if self.unet.config.in_channels != (1 + images) * self.unet.config.out_channels:
            widen_conv_in(self.unet, images)

    @property
    def tokenizers(self) -> list["PreTrainedTokenizerBase"]:
        """Return the tokenizers of the text encoders: one, or two for SDXL."""
        named = (getattr(self.pipeline, name, None) for name in ("tokenizer", "tokenizer_2"))
        return [tokenizer for tokenizer in named if tokenizer is not None]

    def to(self, device: torch.device | str) -> "BaseModel":
        """Move every component and the flow's table to a device, and return this model."""
        self.pipeline.to(device)
        self.flow = self.flow.to(device)
        return self

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Return the autoencoder's posterior of images.

        Args:
            pixel_values: Images, [B, 3, H, W], float32, in [-1, 1].

        Returns:
            {"mean", "std"}, each [B, C, H / downsampling, W / downsampling], not yet scaled.
        """
        return posterior_of(self.vae, pixel_values.to(*_device_and_dtype(self.vae)))

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Return the autoencoder's latents at the unit variance that the network expects."""
        scaling: float = self.vae.config.scaling_factor
        return latents * scaling

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return what `decode_with_gradient` does, without a gradient."""
        return self.decode_with_gradient(latents)

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """Return the images of scaled latents, through which a gradient reaches the latents.

        Args:
            latents: Latents, [B, C, h, w], at unit variance.

        Returns:
            Images, [B, 3, H, W], float32, in about [-1, 1]: values are not clamped.
        """
        unscaled = latents / self.vae.config.scaling_factor
        decoded: Tensor = self.vae.decode(unscaled.to(_device_and_dtype(self.vae)[1])).sample
        return decoded.float()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the text condition of prompts.

        Args:
            prompts: B prompts. The tokenizer cuts those that are too long.

        Returns:
            {"encoder_hidden_states" [B, L, D]}, for SDXL also {"text_embeds" [B, P]}.
        """
        if not hasattr(self.pipeline, "encode_prompt"):  # InstructPix2Pix's and Marigold's have none
            return {"encoder_hidden_states": _encode_text(self.pipeline, prompts)}
        encoded = self.pipeline.encode_prompt(
            prompt=list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        condition = {"encoder_hidden_states": encoded[0]}
        if len(encoded) > 2:
            condition["text_embeds"] = encoded[2]
        return condition

    def empty_condition(self, count: int = 1) -> dict[str, Tensor]:
        """Return the text condition of `count` empty prompts, as the stock pipeline makes it: zeros for SDXL."""
        condition = self.encode_prompts([""] * count)
        if getattr(self.pipeline.config, "force_zeros_for_empty_prompt", False):
            condition = {name: torch.zeros_like(value) for name, value in condition.items()}
        return condition

    def added_cond_kwargs(self, condition: dict[str, Tensor], height: int, width: int) -> dict[str, Tensor] | None:
        """Return SDXL's micro-conditioning for images of one size that were not cropped.

        Args:
            condition: Text condition, as `encode_prompts` returns it.
            height: Height of the images, in pixels.
            width: Width of the images, in pixels.

        Returns:
            {"text_embeds" [B, P], "time_ids" [B, 6]}, or None for models other than SDXL.
        """
        if "text_embeds" not in condition:
            return None
        text_embeds = condition["text_embeds"]
        time_ids = text_embeds.new_tensor([height, width, 0, 0, height, width]).expand(len(text_embeds), -1)
        return {"text_embeds": text_embeds, "time_ids": time_ids}

    def fingerprint(self, *components: str, most: int | None = None) -> str:
        """Return a SHA-256 over the weights and configuration of components, in hexadecimal.

        A tokenizer counts by its vocabulary and by what it makes of a few texts. The location of the model and the
        program that saved it do not matter.

        Args:
            components: Names of components in the pipeline. Those that the pipeline lacks are skipped.
            most: Number of elements read of each weight, from its first on; None reads them all.
        """
        digest = hashlib.sha256()
        for name in components:
            module = getattr(self.pipeline, name, None)
            if module is None:
                continue
            if not isinstance(module, nn.Module):
                tokens = module(
                    list(_PROBES), padding="max_length", truncation=True, max_length=min(module.model_max_length, 77)
                )
                content = [module.get_vocab(), module.model_max_length, tokens["input_ids"]]
                digest.update(json.dumps(content, sort_keys=True).encode())
                continue
            digest.update(json.dumps(_configuration(module), sort_keys=True, default=str).encode())
            for key, tensor in module.state_dict().items():
                digest.update(key.encode())
                read = tensor.detach().reshape(-1)[:most].to("cpu")
                if read.dtype in (torch.float16, torch.bfloat16):
                    read = read.float()  # The type in which weights are held does not matter.
                digest.update(read.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def fingerprints(self) -> dict[str, str]:
        """Return short fingerprints of the "unet", the "vae" and the "text_encoders", to recognise the model.

        Each is of a part of each weight; that of the text encoders holds their tokenizers, too. They are those of the
        model without a LoRA, and so are taken before one is merged or injected. The type in which the weights are held
        does not matter.
        """
        parts = {"unet": ("unet",), "vae": ("vae",), "text_encoders": TEXT_COMPONENTS}
        return {name: self.fingerprint(*components, most=4096)[:16] for name, components in parts.items()}

    def _frozen(self) -> list[nn.Module]:
        """Return the components that are never trained."""
        parts = [self.vae, getattr(self.pipeline, "text_encoder", None), getattr(self.pipeline, "text_encoder_2", None)]
        return [part for part in parts if part is not None]


# Texts that tell tokenizers of one vocabulary apart: by their merges, their padding, and what they do to letters.
_PROBES = (
    "",
    "a photograph of an astronaut riding a horse on the moon, highly detailed, 8k",
    "The QUICK brown fox's 12 jumps over 3,450 lazy dogs & cats! (été, naïve, straße)",
    "watercolour lighthouse thunderstorm butterfly architecture mountainous strawberry",
)


def flow_of_scheduler(scheduler: "SchedulerMixin") -> Flow:
    """Return the flow of the network that a scheduler of diffusers belongs to.

    Args:
        scheduler: Scheduler for diffusion, or for flow matching.

    Raises:
        ModelError: The scheduler belongs to no network that can be aligned, and not to one that predicts the flow.
    """
    is_naive = predicts_flow(getattr(scheduler, "config", {}))
    return NaiveFlow.from_scheduler(scheduler) if is_naive else Alignment.from_scheduler(scheduler)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Return PIL images of a tensor [B, 3, H, W] in [-1, 1], clamped and rounded to 8 bits."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]


def _configuration(module: nn.Module) -> dict[str, object]:
    """Return the entries of a component's configuration that describe the model, not how it was saved."""
    config: Any = module.config
    entries = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {key: value for key, value in entries.items() if not key.startswith("_") and key != "transformers_version"}


def _encode_text(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """Return the text condition of prompts from the one text encoder of a pipeline, as diffusers makes it."""
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).to(encoder.device)
    mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
    encoded: Tensor = encoder(tokens.input_ids, attention_mask=mask)[0]
    return encoded


def _device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device and the type of a network's first parameter.

    diffusers' own properties look at every module, which takes 4 ms for the network of SD1.5.
    """
    parameter = next(module.parameters())
    return parameter.device, parameter.dtype

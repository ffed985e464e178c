"""Load a pretrained diffusion model, encode its texts and images, and refuse what cannot be trained.

A model is a diffusers pipeline: a hub id, a folder, or a single `.safetensors` file. Only safetensors are read; nothing
unpickles.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from d2f_fast.errors import ModelError
from d2f_fast.flow.alignment import Alignment
from d2f_fast.models.load import load_pipeline


class BaseModel:
    """A diffusers text-to-image pipeline, taken apart for training.

    Args:
        pipeline: StableDiffusionPipeline, StableDiffusionXLPipeline, or one with the same components and
            `encode_prompt`.

    Raises:
        ModelError: it has no UNet2DConditionModel, or its scheduler cannot be aligned.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        if type(getattr(pipeline, "unet", None)).__name__ != "UNet2DConditionModel":
            raise ModelError(f"{type(pipeline).__name__} has no UNet2DConditionModel: give a Stable Diffusion pipeline")
        self.unet = pipeline.unet
        self.vae = pipeline.vae
        self.alignment = Alignment.from_scheduler(pipeline.scheduler)
        for component in self._frozen():
            component.requires_grad_(False).eval()

    @classmethod
    def load(cls, model: str | Path, dtype: torch.dtype = torch.float32) -> "BaseModel":
        """Load a hub id, a pipeline folder or a single `.safetensors` file.

        Raises:
            ModelError: as `load_pipeline`, or as the constructor; the message names the file.
        """
        pipeline = load_pipeline(model, dtype)
        try:
            return cls(pipeline)
        except ModelError as error:
            raise ModelError(f"{model}: {error}") from error

    def _frozen(self) -> list[nn.Module]:
        parts = [self.vae, getattr(self.pipeline, "text_encoder", None), getattr(self.pipeline, "text_encoder_2", None)]
        return [part for part in parts if part is not None]

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return _place(self.unet)[0]

    @property
    def downsampling(self) -> int:
        """Pixels a latent, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def to(self, device: torch.device | str) -> "BaseModel":
        """Move every component, and the alignment's table."""
        self.pipeline.to(device)
        self.alignment = self.alignment.to(device)
        return self

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Posterior of the autoencoder: {"mean", "std"}, each [B, C, H / f, W / f], unscaled.

        Args:
            pixel_values: [B, 3, H, W] float32 in [-1, 1].
        """
        posterior = self.vae.encode(pixel_values.to(*_place(self.vae))).latent_dist
        return {"mean": posterior.mean, "std": posterior.std}

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Latents in the network's unit-variance scale."""
        return latents * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of scaled latents, [B, 3, H, W] float32 in [-1, 1] (not clamped)."""
        return self.vae.decode((latents / self.vae.config.scaling_factor).to(_place(self.vae)[1])).sample.float()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Text condition of prompts: {"encoder_hidden_states" [B, L, D]}, for SDXL also {"text_embeds" [B, P]}."""
        encoded = self.pipeline.encode_prompt(
            prompt=list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        condition = {"encoder_hidden_states": encoded[0]}
        if len(encoded) > 2:
            condition["text_embeds"] = encoded[2]
        return condition

    def empty_condition(self, count: int = 1) -> dict[str, Tensor]:
        """Text condition of `count` empty prompts, as the stock pipeline has it: of SDXL zeros."""
        condition = self.encode_prompts([""] * count)
        if getattr(self.pipeline.config, "force_zeros_for_empty_prompt", False):
            condition = {name: torch.zeros_like(value) for name, value in condition.items()}
        return condition

    def added_cond_kwargs(self, condition: dict[str, Tensor], height: int, width: int) -> dict[str, Tensor] | None:
        """SDXL's micro-conditioning for uncropped pictures of one size, pixels; None for other models."""
        if "text_embeds" not in condition:
            return None
        text_embeds = condition["text_embeds"]
        time_ids = text_embeds.new_tensor([height, width, 0, 0, height, width]).expand(len(text_embeds), -1)
        return {"text_embeds": text_embeds, "time_ids": time_ids}

    def fingerprint(self, *components: str, most: int | None = None) -> str:
        """SHA-256 over the weights and configuration of components, or a tokenizer's vocabulary, by name.

        Absent components are passed over. Where the model lies, and by what it was saved, changes nothing.

        Args:
            components: names in the pipeline.
            most: elements of each weight that are read, from its first on; None for all.
        """
        digest = hashlib.sha256()
        for name in components:
            module = getattr(self.pipeline, name, None)
            if module is None:
                continue
            if not isinstance(module, nn.Module):
                vocabulary = [module.get_vocab(), module.model_max_length]
                digest.update(json.dumps(vocabulary, sort_keys=True).encode())
                continue
            owned: Any = module.config
            config = owned.to_dict() if hasattr(owned, "to_dict") else dict(owned)
            config = {key: value for key, value in config.items() if not key.startswith("_")}
            config.pop("transformers_version", None)
            digest.update(json.dumps(config, sort_keys=True, default=str).encode())
            for key, tensor in module.state_dict().items():
                digest.update(key.encode())
                read = tensor.detach().reshape(-1)[:most].to("cpu")
                digest.update(read.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a network, by its first parameter: diffusers' own properties walk all modules, for 4 ms."""
    parameter = next(module.parameters())
    return parameter.device, parameter.dtype


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """PIL images of pictures [B, 3, H, W] in [-1, 1], clamped and rounded."""
    pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]

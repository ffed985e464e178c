"""Load the model that is exported, and refuse pipelines that have no place in the folder's layout."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import AutoModel
from safetensors import SafetensorError

from d2f_fast.errors import ModelError
from d2f_fast.models.base_model import BaseModel
from d2f_fast.models.options import ModelOptions

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny


def load_model(model: str, vae: str | None, options: ModelOptions | None = None) -> BaseModel:
    """Load a model in float32, with another autoencoder where one is named.

    Args:
        model: hub id, pipeline folder, .safetensors file, or "miniature" for the embedded model.
        vae: hub id or folder of the other autoencoder; None keeps the model's own.
        options: options of the base model; None for the defaults.

    Raises:
        ModelError: the model or the autoencoder cannot be loaded or does not fit.
    """
    loaded = BaseModel.load(model, options=options)
    for name in ("vae", "tokenizer", "text_encoder"):
        if getattr(loaded.pipeline, name, None) is None:
            raise ModelError(f"{model} has no {name}: give a complete Stable Diffusion pipeline")
    if vae is not None:
        loaded.pipeline.register_modules(vae=_load_vae(vae, loaded.vae))
        loaded = BaseModel(loaded.pipeline, options, loaded.facts)
    if getattr(loaded.vae.config, "latents_mean", None) is not None:
        raise ModelError(
            f"{vae or model}: its autoencoder shifts latents by latents_mean, which no exported graph does; give --vae"
            " an autoencoder without it"
        )
    return loaded


def _load_vae(vae: str, own: "AutoencoderKL") -> "AutoencoderKL | AutoencoderTiny":
    """Load an autoencoder whose latents have the size of those of the model's own."""
    if not Path(vae).is_dir() and (Path(vae).is_absolute() or vae.startswith(".")):
        raise ModelError(f"vae {vae} does not exist: give a hub id, or the folder of an autoencoder")
    try:
        found = AutoModel.from_pretrained(vae, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"vae {vae} cannot be loaded ({reason}): give an intact autoencoder") from error
    if type(found).__name__ not in ("AutoencoderKL", "AutoencoderTiny"):
        raise ModelError(f"vae {vae} is a {type(found).__name__}: give an AutoencoderKL or an AutoencoderTiny")
    for name, new, old in (
        ("latent channels", found.config.latent_channels, own.config.latent_channels),
        ("pixels per latent", *(2 ** (len(one.config.block_out_channels) - 1) for one in (found, own))),
    ):
        if new != old:
            raise ModelError(f"vae {vae} has {new} {name}, the model's own has {old}: give one made for this model")
    return found

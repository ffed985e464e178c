"""Check that a single file holds every weight of its model, and no other, from the shapes in its header alone.

diffusers leaves a weight that the file lacks unfilled, and drops a weight that it does not know without a word.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from d2f_fast.errors import ModelError, printable

_UNET = "model.diffusion_model."
_NO_WEIGHTS = ("position_ids",)  # Newer versions of transformers compute these numbers.


def check_weights(
    where: str,
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    table: Mapping[str, Any],
    text_prefixes: tuple[str, ...],
    *,
    with_vae: bool,
) -> None:
    """Refuse a single file in which a weight is missing, has another shape, or belongs to no layer of the UNet.

    Args:
        where: Name of the file, for messages.
        name: Name of the family, for messages.
        shapes: Shape of each tensor of the file by key.
        table: Configuration of each part of the model.
        text_prefixes: First parts of the text encoders' keys, in the order of the encoders.
        with_vae: Whether the file's own autoencoder is used.

    Raises:
        ModelError: A weight is missing, has another shape, or is unknown.
    """
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(table["unet"])
            found = convert_ldm_unet_checkpoint(dict(tensors), table["unet"])
            used = {id(tensor) for tensor in found.values()}
            for key, tensor in tensors.items():
                if key.startswith(_UNET) and id(tensor) not in used:
                    raise ModelError(
                        f"{where}: {printable(key)} is not a weight of a UNet of {name}: give a model of SD1.x, SD2.x"
                        " or SDXL without additions"
                    )
            _compare(where, name, "unet", unet.state_dict(), found)
            if with_vae:
                vae = AutoencoderKL.from_config(table["vae"])
                found = convert_ldm_vae_checkpoint(dict(tensors), table["vae"])
                _compare(where, name, "vae", vae.state_dict(), found)
            for component, prefix in zip(("text_encoder", "text_encoder_2"), text_prefixes, strict=False):
                kind = CLIPTextModel if component == "text_encoder" else CLIPTextModelWithProjection
                encoder = kind(CLIPTextConfig(**table[component]))
                _compare(where, name, component, encoder.state_dict(), _text_tensors(encoder, tensors, prefix))
    except (KeyError, IndexError) as error:  # A converter of diffusers asks for a key that the file does not have.
        raise ModelError(
            f"{where} holds no {printable(error.args[0] if error.args else error)}: give an intact file with every part"
        ) from error


def check_autoencoder(where: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> None:
    """Refuse a file of an AutoencoderKL in which a weight is missing or has another shape.

    Args:
        where: Name of the file, for messages.
        shapes: Shape of each tensor of the file by key, in the original layout or that of diffusers.
        config: Configuration that the autoencoder will have.

    Raises:
        ModelError: A weight is missing or has another shape.
    """
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    try:
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(config)
            is_original = not any(key.startswith("decoder.mid_block.") for key in tensors)
            found = convert_ldm_vae_checkpoint(dict(tensors), config) if is_original else tensors
    except (KeyError, IndexError) as error:
        missing = printable(error.args[0] if error.args else error)
        raise ModelError(f"autoencoder {where} holds no {missing}: give an intact file") from error
    for key, tensor in vae.state_dict().items():
        if key not in found:
            raise ModelError(f"autoencoder {where} holds no weights for {key}: give an intact file")
        if found[key].shape != tensor.shape and not _is_old_attention(key, found[key]):
            raise ModelError(
                f"autoencoder {where}: {key} has shape {list(found[key].shape)}, and that of the model's own"
                f" autoencoder is {list(tensor.shape)}: give one made for this model, or a folder with a configuration"
            )


def _is_old_attention(key: str, tensor: Tensor) -> bool:
    """Return whether a weight is that of an attention layer as a 1×1 convolution, which diffusers reshapes itself."""
    return ".attentions." in key and tensor.shape[2:] == (1, 1)


def _text_tensors(encoder: Any, tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a text encoder under the names of the installed version of transformers."""
    if prefix.endswith(".model."):
        found = convert_open_clip_checkpoint(encoder, tensors, prefix=prefix)
    else:
        found = convert_ldm_clip_checkpoint({key: value for key, value in tensors.items() if key.startswith(prefix)})
    flat = not hasattr(encoder, "text_model")  # transformers 5.6 dropped "text_model." from the names.
    return {key.removeprefix("text_model.") if flat else key: value for key, value in found.items()}


def _compare(
    where: str, name: str, component: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> None:
    """Refuse a part of which a tensor is missing or has another shape."""
    for key, tensor in expected.items():
        if key not in found:
            if not key.endswith(_NO_WEIGHTS):
                raise ModelError(
                    f"{where} holds no weights for {key} of the {component}: give an intact file with every part"
                )
        elif found[key].shape != tensor.shape:
            raise ModelError(
                f"{where}: {key} of the {component} has shape {list(found[key].shape)}, and {name} has"
                f" {list(tensor.shape)}: give a model of SD1.x, SD2.x or SDXL"
            )

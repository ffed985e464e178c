"""The autoencoder of a model: another one in its place, and its scale and shift.

    latents of the UNet = (latents of the autoencoder - shift) · scale

diffusers' pipelines of Stable Diffusion ignore the shift, as other programs do. It is therefore added to the biases of
the two 1×1 convolutions between the autoencoder and its latents, which is exact, and then is the same in every program.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, AutoModel
from safetensors import SafetensorError
from torch import Tensor, nn

from d2f_fast.errors import CheckpointError, ModelError, printable
from d2f_fast.files.tensor_header import read_tensor_header
from d2f_fast.models.folder import check_real_weights
from d2f_fast.models.names import check_autoencoder_name, is_single_file
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.single_file_weights import check_autoencoder

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny

_MOST_CHARACTERS = 200  # of the reason that diffusers gives, which may list every weight
_CLASSES = ("AutoencoderKL", "AutoencoderTiny")
_KEY_OF_LATENTS = ("decoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight", "vae.decoder.conv_in.weight")


def load_autoencoder(source: str, dtype: torch.dtype, config: Mapping[str, Any]) -> "Autoencoder":
    """Load an autoencoder alone.

    Args:
        source: Hub id, folder of an autoencoder or of a pipeline, or `.safetensors` file of an AutoencoderKL in the
            original layout or that of diffusers.
        dtype: Type of the weights.
        config: Configuration for a single file, which has none: that of the model's own autoencoder.

    Raises:
        ModelError: The autoencoder cannot be loaded, is a pickle, or is of a class that the pipelines do not take.
    """
    check_autoencoder_name(source)
    path, where = Path(source), f"autoencoder {printable(source)}"
    try:
        if is_single_file(source):
            return _load_file(path, dtype, config)
        subfolder = "vae" if (path / "model_index.json").is_file() else None
        found = AutoModel.from_pretrained(source, subfolder=subfolder, use_safetensors=True, dtype=dtype)
    except (OSError, ValueError, KeyError, NotImplementedError, SafetensorError, CheckpointError) as error:
        if isinstance(error, ModelError):
            raise
        reason = " ".join(str(error).split()).partition(". ")[0][:_MOST_CHARACTERS]
        raise ModelError(f"{where} cannot be loaded ({reason}): give an intact autoencoder") from error
    if type(found).__name__ not in _CLASSES:
        raise ModelError(f"{where} is a {type(found).__name__}: give an {_CLASSES[0]} or an {_CLASSES[1]}")
    return found


def prepare_autoencoder(pipeline: "DiffusionPipeline", options: ModelOptions, dtype: torch.dtype) -> None:
    """Put the autoencoder that the options name into a pipeline, and give it its scale and shift.

    Args:
        pipeline: Pipeline of any model; one without an autoencoder is left as it is.
        options: Options of the base model.
        dtype: Type of the autoencoder's weights.

    Raises:
        ModelError: The autoencoder cannot be loaded, or its latents do not fit the UNet.
    """
    own = getattr(pipeline, "vae", None)
    if own is None:
        return
    if (source := options.pretrained_vae_model_name_or_path) is not None:
        other = load_autoencoder(source, dtype, own.config)
        check_fits(source, other, pipeline.unet.config.out_channels, own)
        pipeline.register_modules(vae=other)
        own = other
    set_scale_and_shift(own, options.vae_custom_scale, options.vae_custom_shift)


def check_fits(source: str, autoencoder: "Autoencoder", channels: int, own: "Autoencoder | None") -> None:
    """Refuse an autoencoder whose latents the UNet does not take.

    Args:
        source: Name of the autoencoder, for messages.
        autoencoder: Autoencoder that is to be used.
        channels: Number of channels that the UNet returns.
        own: The model's own autoencoder; None where the model has none.

    Raises:
        ModelError: The latents have another number of channels, or another size than those of `own`.
    """
    where, cure = f"autoencoder {printable(source)}", "give one made for this model"
    latents = autoencoder.config.latent_channels
    if latents != channels:
        raise ModelError(f"{where} has {latents} latent channels, the UNet has {channels}: {cure}")
    if own is not None and (new := _pixels_per_latent(autoencoder)) != (old := _pixels_per_latent(own)):
        raise ModelError(f"{where} has {new} pixels per latent, the model's own has {old}: {cure}")


def set_scale_and_shift(autoencoder: "Autoencoder", scale: float | None, shift: float | None) -> None:
    """Give an autoencoder its scale, and add its shift to its weights, so that no program needs to know the shift.

    Args:
        autoencoder: Autoencoder, which is changed in place. Afterwards its configuration has no shift.
        scale: Factor on the latents; None keeps `scaling_factor` of the configuration.
        shift: Number that is subtracted from the latents first; None takes `shift_factor` of the configuration.

    Raises:
        ModelError: The autoencoder has a shift, and no place for it.
    """
    if scale is not None:
        autoencoder.register_to_config(scaling_factor=scale)
    shift = autoencoder.config.get("shift_factor") or 0.0 if shift is None else shift
    if not shift:
        return
    if type(autoencoder).__name__ != "AutoencoderKL":
        raise ModelError(f"{type(autoencoder).__name__} has no place for a shift of {shift}: give an AutoencoderKL")
    channels: int = autoencoder.config.latent_channels
    if autoencoder.quant_conv is None:
        autoencoder.quant_conv = _identity(2 * channels, autoencoder)
    if autoencoder.post_quant_conv is None:
        autoencoder.post_quant_conv = _identity(channels, autoencoder)
    with torch.no_grad():
        before, after = autoencoder.quant_conv, autoencoder.post_quant_conv
        before.bias[:channels] -= shift  # The other channels are the logarithms of the variances.
        after.bias += shift * after.weight.float().sum(dim=(1, 2, 3)).to(after.bias.dtype)
    autoencoder.register_to_config(shift_factor=None, use_quant_conv=True, use_post_quant_conv=True)


def autoencoder_tags(options: ModelOptions) -> dict[str, str]:
    """Return the entries of a file's header that name the autoencoder of a run where it is not the model's own.

    Args:
        options: Options of the base model. Of a path only the last part is named.
    """
    source = options.pretrained_vae_model_name_or_path
    name = None if source is None else Path(source).name if Path(source).exists() else source
    stated = {"vae": name, "vae_scale": options.vae_custom_scale, "vae_shift": options.vae_custom_shift}
    return {f"d2f.{entry}": str(value) for entry, value in stated.items() if value is not None}


def other_autoencoder(tags: Mapping[str, str], options: ModelOptions) -> str | None:
    """Return a sentence on the options of the autoencoder that a LoRA was trained with and that are not given now.

    Args:
        tags: Entries of the LoRA's header that begin with "d2f.".
        options: Options of the base model.

    Returns:
        The sentence, or None where the options are the same.
    """
    given = autoencoder_tags(options)
    names = {
        "vae": "pretrained_vae_model_name_or_path",
        "vae_scale": "vae_custom_scale",
        "vae_shift": "vae_custom_shift",
    }
    missing = [
        f"--{option} {printable(value[:200])}"
        for entry, option in names.items()
        if (value := tags.get(f"d2f.{entry}")) is not None and value != given.get(f"d2f.{entry}")
    ]
    if not missing:
        return None
    return f"the LoRA was trained with {' '.join(missing)}: give the same, unless the model itself has this autoencoder"


def posterior_of(autoencoder: "Autoencoder", pixel_values: Tensor) -> dict[str, Tensor]:
    """Return mean and deviation of the latents of images; an autoencoder without a posterior has a deviation of 0.

    Args:
        autoencoder: Autoencoder.
        pixel_values: Images, [B, 3, H, W], in [-1, 1], of its device and type.
    """
    encoded = autoencoder.encode(pixel_values)
    if hasattr(encoded, "latent_dist"):
        return {"mean": encoded.latent_dist.mean, "std": encoded.latent_dist.std}
    return {"mean": encoded.latents, "std": torch.zeros_like(encoded.latents)}


def _load_file(path: Path, dtype: torch.dtype, config: Mapping[str, Any]) -> AutoencoderKL:
    """Load an AutoencoderKL from a single file, with the configuration of another one."""
    keys = read_tensor_header(path).tensors
    latents = next((keys[key].shape for key in _KEY_OF_LATENTS if key in keys), ())
    if len(latents) != 4 or not any(key.endswith("encoder.conv_in.weight") for key in keys):
        raise ModelError(f"autoencoder {printable(path)} holds no AutoencoderKL: give one, or a folder")
    table = {key: value for key, value in config.items() if not key.startswith("_")}
    table |= {"_class_name": "AutoencoderKL", "latent_channels": latents[1]}
    check_real_weights(path, keys)
    check_autoencoder(printable(path), {key: info.shape for key, info in keys.items()}, table)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(table), encoding="utf-8")
        return AutoencoderKL.from_single_file(str(path), config=folder, dtype=dtype)


def _pixels_per_latent(autoencoder: "Autoencoder") -> int:
    """Return the number of pixels along each side of one latent."""
    return 1 << (len(autoencoder.config.block_out_channels) - 1)


def _identity(channels: int, like: nn.Module) -> nn.Conv2d:
    """Return the 1×1 convolution that changes nothing, of the device and type of another module."""
    parameter = next(like.parameters())
    layer = nn.Conv2d(channels, channels, 1, device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(channels)[:, :, None, None])
        layer.bias.zero_()  # type: ignore[union-attr]
    return layer

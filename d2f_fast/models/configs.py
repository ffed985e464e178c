"""Check a model as far as names, configurations and headers of its files allow. Imports no torch.

`d2f train` and `d2f sample` refuse here in a second what they would refuse only after the model is loaded.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from d2f_fast.errors import ModelError, RefusedInputError, printable
from d2f_fast.flow.scheduler_config import predicts_flow
from d2f_fast.models.folder import cached_folder, check_folder, read_config
from d2f_fast.models.names import MINIATURE, check_autoencoder_name, is_single_file
from d2f_fast.models.options import ModelOptions, check_flow_schedule, check_model, check_prediction_type
from d2f_fast.models.single_file_header import check_has_vae, fitted_table, read_single_file, stated_prediction

MINIATURE_FOLDER = Path(__file__).parent.parent / "miniature" / "pipeline"


class ModelConfigs(NamedTuple):
    """Configurations of the parts of a model that decide what it can be used for.

    Attributes:
        unet: Content of the UNet's config.json.
        vae: The same for the autoencoder.
        scheduler: The same for the scheduler, with the prediction type that the options or the model's file state.
    """

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any] = MappingProxyType({})


def read_configs(model: str, options: ModelOptions) -> ModelConfigs | None:
    """Refuse a model whose files show that it cannot be loaded, and return its configurations.

    Args:
        model: Hub id, pipeline folder, `.safetensors` file, or "miniature".
        options: Options of the base model.

    Returns:
        The configurations; None for a hub id, whose files may have to be downloaded first.

    Raises:
        ModelError: A file is missing, damaged or a pickle, or an option does not go with the model.
        CheckpointError: A configuration is missing or not JSON.
    """
    check_model(model, options)
    if options.pretrained_vae_model_name_or_path is not None:
        check_autoencoder_name(options.pretrained_vae_model_name_or_path)
    if is_single_file(model):
        file = read_single_file(Path(model))
        if options.pretrained_vae_model_name_or_path is None:
            check_has_vae(file)
        table = fitted_table(file)
        prediction = stated_prediction(file, options.prediction_type) or (table["scheduler"]["prediction_type"], "")
        scheduler = _with_options({**table["scheduler"], "prediction_type": prediction[0]}, options, prediction[1])
        return ModelConfigs(table["unet"], table["vae"], scheduler)
    if model == MINIATURE:
        folder = MINIATURE_FOLDER
    elif (folder := Path(model)).is_dir():
        check_folder(folder, options.variant)
    elif _is_offline():
        folder = Path(cached_folder(model, options.revision, options.variant))
    else:
        return None
    unet, vae = (read_config(folder / part / "config.json") for part in ("unet", "vae"))
    scheduler = read_config(folder / "scheduler" / "scheduler_config.json")
    try:
        return ModelConfigs(unet, vae, _with_options(scheduler, options, "scheduler_config.json"))
    except ModelError as error:
        raise ModelError(f"{printable(model)}: {error}") from error


def _with_options(scheduler: Mapping[str, Any], options: ModelOptions, source: str) -> Mapping[str, Any]:
    """Return a scheduler's configuration with the prediction type of the options, or refuse what it states."""
    if options.prediction_type is not None:
        return {**scheduler, "prediction_type": options.prediction_type}
    if "prediction_type" in scheduler:
        check_prediction_type(scheduler["prediction_type"], source)
    if predicts_flow(scheduler):
        check_flow_schedule(options, f"a model that predicts the flow ({source})")
    return scheduler


def _is_offline() -> bool:
    """Return whether nothing may be downloaded from the hub."""
    from huggingface_hub.constants import HF_HUB_OFFLINE  # Only a hub id needs the library.

    return bool(HF_HUB_OFFLINE)


def downsampling_of(vae: Mapping[str, Any]) -> int:
    """Return the number of pixels along each side of one latent.

    Args:
        vae: Configuration of the autoencoder.
    """
    return 1 << (len(vae["block_out_channels"]) - 1)


def resolution_of(unet: Mapping[str, Any], downsampling: int) -> int:
    """Return the side of the images that a model was made for, in pixels; the shorter one where they differ.

    Args:
        unet: Configuration of the UNet.
        downsampling: Number of pixels along each side of one latent.

    Raises:
        RefusedInputError: The configuration does not say it.
    """
    side = unet.get("sample_size")
    sides = side if isinstance(side, list | tuple) else [side]
    if not sides or not all(isinstance(each, int) and each > 0 for each in sides):
        raise RefusedInputError(f"resolution: the UNet's configuration has sample_size {side}: give --resolution")
    shorter: int = min(sides)
    return shorter * downsampling


def check_sees_no_image(model: str, configs: ModelConfigs) -> None:
    """Refuse a model whose network takes images beside its latents, which the prompts of `d2f sample` do not give.

    Args:
        model: Name of the model, for the message.
        configs: Configurations of the model.

    Raises:
        ModelError: The UNet takes other channels than those of its latents.
    """
    channels, latents = configs.unet.get("in_channels", 4), configs.vae.get("latent_channels", 4)
    if channels != latents:
        raise ModelError(
            f"{printable(model)} takes {channels} channels, and its latents have {latents}: add --task depth for a"
            " model of depth, or give a text-to-image model"
        )


def check_training(configs: ModelConfigs, resolution: int | None, images: int = 0) -> None:
    """Refuse a model that would fail in its first training step.

    Args:
        configs: Configurations of the model.
        resolution: Side of the training images in pixels; None for the model's own size.
        images: Number of images whose latents the network sees beside its own; 0 for text-to-image. A model of that
            number is accepted, and so is a text-to-image model, which is widened.

    Raises:
        ModelError: The UNet takes an input that the training does not give.
        RefusedInputError: The autoencoder has no latents of the resolution, or nothing says what it is.
    """
    unet, latents = configs.unet, configs.vae.get("latent_channels", 4)
    if (channels := unet.get("in_channels", 4)) not in (latents, latents * (1 + images)):
        kind = f"text-to-image model, or one of {latents * (1 + images)} channels" if images else "text-to-image model"
        raise ModelError(f"the UNet takes {channels} channels and the autoencoder makes {latents}: give a {kind}")
    for name in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim"):
        if unet.get(name) is not None:
            raise ModelError(
                f"the UNet has {name} {unet[name]}, an input that text-to-image training does not give: give a"
                " text-to-image model"
            )
    downsampling = downsampling_of(configs.vae)
    side = resolution_of(unet, downsampling) if resolution is None else resolution
    if side % downsampling:
        raise RefusedInputError(f"resolution must be a multiple of {downsampling}, got {side}")

"""Check a model as far as names, configurations and headers of its files allow. Imports no torch.

`d2f train` and `d2f sample` refuse here in a second what they would refuse only after the model is loaded.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from d2f_fast.errors import ModelError, RefusedInputError, printable
from d2f_fast.flow.scheduler_config import check_zero_snr, has_zero_snr, predicts_flow
from d2f_fast.image_sizes import Resolution, side_multiple, sizes_of
from d2f_fast.models.folder import cached_folder, check_folder, read_config
from d2f_fast.models.names import MINIATURE, check_autoencoder_name, is_single_file
from d2f_fast.models.options import ModelOptions, check_flow_schedule, check_model, check_prediction_type
from d2f_fast.models.single_file_header import (
    check_has_vae,
    fitted_table,
    read_single_file,
    stated_prediction,
    stated_zero_snr,
)

# Class that takes the place of one without zero terminal SNR where this is asked for.
_WITH_ZERO_SNR = "EulerDiscreteScheduler"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
MINIATURE_FOLDER = Path(__file__).parent.parent / "miniature" / "pipeline"


class ModelConfigs(NamedTuple):
    """Configurations of the parts of a model that decide what it can be used for.

    Attributes:
        unet: Content of the UNet's config.json.
        vae: The same for the autoencoder.
        scheduler: The same for the scheduler, with what the options or the model's file state of it.
        text_encoders: Number of text encoders.
    """

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any] = MappingProxyType({})
    text_encoders: int = 1


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
        stated = {**table["scheduler"], "prediction_type": prediction[0]}
        if (zero_snr := stated_zero_snr(file)) is not None and zero_snr[0]:
            stated |= {"rescale_betas_zero_snr": True, "_class_name": _WITH_ZERO_SNR}
        try:
            scheduler = _with_options(stated, options, prediction[1])
        except ModelError as error:
            raise ModelError(f"{printable(model)}: {error}") from error
        return ModelConfigs(table["unet"], table["vae"], scheduler, sum(name in table for name in TEXT_ENCODERS))
    if (folder := model_folder(model, options)) is None:
        return None
    if folder == Path(model):  # The other two are whole.
        check_folder(folder, options.variant)
    unet, vae = (read_config(folder / part / "config.json") for part in ("unet", "vae"))
    scheduler = read_config(folder / "scheduler" / "scheduler_config.json")
    try:
        settled = _with_options(scheduler, options, "scheduler_config.json")
    except ModelError as error:
        raise ModelError(f"{printable(model)}: {error}") from error
    index = read_config(folder / "model_index.json")
    encoders = [name for name in TEXT_ENCODERS if index.get(name, [None, None]) != [None, None]]
    return ModelConfigs(unet, vae, settled, len(encoders))


def model_folder(model: str, options: ModelOptions) -> Path | None:
    """Return the folder of a model; None for a hub id, whose files may have to be downloaded first.

    Args:
        model: Hub id, pipeline folder, or "miniature".
        options: Options of the base model.

    Raises:
        ModelError: Nothing may be downloaded, and the model is not whole on this machine.
    """
    if model == MINIATURE:
        return MINIATURE_FOLDER
    if Path(model).is_dir():
        return Path(model)
    return Path(cached_folder(model, options.revision, options.variant)) if _is_offline() else None


def local_name(model: str, options: ModelOptions) -> str | None:
    """Return the name of a model whose files can be read at once: of a hub id its folder, and any other as it is.

    Args:
        model: Hub id, pipeline folder, `.safetensors` file, or "miniature".
        options: Options of the base model.

    Returns:
        The name; None for a hub id, whose files may have to be downloaded first.

    Raises:
        ModelError: Nothing may be downloaded, and the model is not whole on this machine.
    """
    if model == MINIATURE or is_single_file(model):
        return model
    folder = model_folder(model, options)
    return None if folder is None else str(folder)


def _with_options(scheduler: Mapping[str, Any], options: ModelOptions, source: str) -> Mapping[str, Any]:
    """Return a scheduler's configuration with what the options state of it, or refuse what it states."""
    if options.prediction_type is None and "prediction_type" in scheduler:
        check_prediction_type(scheduler["prediction_type"], source)
    if options.prediction_type is not None:
        scheduler = {**scheduler, "prediction_type": options.prediction_type}
    if predicts_flow(scheduler):
        if options.prediction_type is None:
            check_flow_schedule(options, f"a model that predicts the flow ({source})")
        return scheduler
    if options.rescale_betas_zero_snr is not None:
        scheduler = {**scheduler, "rescale_betas_zero_snr": options.rescale_betas_zero_snr}
        if options.rescale_betas_zero_snr and not has_zero_snr(scheduler):
            scheduler = {**scheduler, "_class_name": _WITH_ZERO_SNR}
    try:
        check_zero_snr(scheduler.get("prediction_type", "epsilon"), has_zero_snr(scheduler))
    except ModelError as error:
        where = "option --rescale_betas_zero_snr" if options.rescale_betas_zero_snr else source
        raise ModelError(f"{where}: {error}" if where else str(error)) from error
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


def check_seen_images(model: str, configs: ModelConfigs, cure: str, images: int = 0) -> None:
    """Refuse a model whose network takes another number of images beside its latents than a command gives it.

    Args:
        model: Name of the model, for the message.
        configs: Configurations of the model.
        cure: What to do instead, for the end of the message.
        images: Number of images for each prompt, 0 or 1.

    Raises:
        ModelError: The UNet takes other channels than those of its latents and the images.
    """
    channels, latents = configs.unet.get("in_channels", 4), configs.vae.get("latent_channels", 4)
    if channels != latents * (1 + images):
        raise ModelError(
            f"{printable(model)} takes {channels} channels, and its latents{' and an image' * images} have"
            f" {latents * (1 + images)}: {cure}"
        )


def check_training(configs: ModelConfigs, resolution: Resolution | None, images: int = 0) -> None:
    """Refuse a model that would fail in its first training step.

    Args:
        configs: Configurations of the model.
        resolution: Resolution of the training images; None for the model's own size.
        images: Number of images whose latents the network sees beside its own; 0 for text-to-image. A model of that
            number is accepted, and so is a text-to-image model, which is widened.

    Raises:
        ModelError: The UNet takes an input that the training does not give.
        RefusedInputError: No images of the resolution can be generated, or nothing says what it is.
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
    multiple = side_multiple(downsampling)
    given = resolution_of(unet, downsampling) if resolution is None else resolution
    for side in dict.fromkeys(side for size in sizes_of(given) for side in size):
        if side % multiple:
            raise RefusedInputError(f"resolution must be a multiple of {multiple}, got {side}")


def check_one_text_encoder(text_encoders: int) -> None:
    """Refuse a model that Marigold's pipeline, which predicts depth, cannot hold.

    Args:
        text_encoders: Number of text encoders of the model.

    Raises:
        ModelError: It has two text encoders, as SDXL, or none.
    """
    if text_encoders != 1:
        raise ModelError("depth needs a model with one text encoder: give one of Stable Diffusion 1.x or 2.x")

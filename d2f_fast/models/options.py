"""Options of the base model: how its files are found, and what replaces their contents. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from d2f_fast.config import PredictionType, check_options, finite, option, positive
from d2f_fast.errors import ModelError, RefusedInputError, printable
from d2f_fast.models.names import check_model_name, is_single_file


@dataclass(frozen=True)
class ModelOptions:
    """Hold the options of the base model that training, sampling and the export share.

    Args:
        prediction_type: What the network predicts: "epsilon" (the noise), "v_prediction", "sample" (the latents of the
            image), or "flow_prediction" (the velocity, as rectified-flow models and those of `d2f train --objective fm`
            do). Default: read from the model's files; of a .safetensors file that does not say it, "epsilon" for SD1.x
            and SDXL, "v_prediction" for SD2.x.
        rescale_betas_zero_snr: The model was trained with zero terminal SNR, so that its last timestep is pure noise;
            --no_rescale_betas_zero_snr says that it was not. An error for a model with flow_prediction. Default: read
            from the model's files.
        tokenizer_name_or_path: Folder with CLIP's vocab.json and merges.txt, or a diffusers pipeline folder, for a
            model that is one .safetensors file, which holds no tokenizer. Default: the vocabulary in the Python package
            open_clip_torch, which must then be installed.
        pretrained_vae_model_name_or_path: Autoencoder (VAE) in place of the model's own: a Hugging Face id, a folder,
            or one .safetensors file, which is read with the configuration of the model's own. Channels and size of its
            latents must be the same. A model that is saved holds it. Default: the model's own.
        vae_custom_scale: Factor on the latents, the scaling_factor of the autoencoder (0.18215 for SD1.5). Default:
            that of its configuration.
        vae_custom_shift: Number that is subtracted from the latents before that factor, the shift_factor of the
            autoencoder. Other programs ignore a shift, so the biases of the autoencoder are changed to include it.
            Default: that of its configuration, or 0.
        variant: Variant of the weight files in a folder or under a Hugging Face id, such as fp16. It chooses files, not
            the precision of the computation. Default: files without a variant.
        revision: Branch, tag or commit of a Hugging Face id. Default: the main branch.
        vae_reflection_padding: Pad the autoencoder's convolutions by reflection, for an autoencoder that was trained
            so, such as some of EQ-VAE; --no_vae_reflection_padding pads with zeros. Other programs always pad with
            zeros. Default: what the model's files say, or zeros.

    Raises:
        RefusedInputError: An option has a value that it does not take, or two options contradict each other.
    """

    prediction_type: PredictionType | None = option("model", None)
    rescale_betas_zero_snr: bool | None = option("model", None)
    tokenizer_name_or_path: str | None = option("model", None, metavar="FOLDER")
    pretrained_vae_model_name_or_path: str | None = option("model", None, metavar="VAE")
    vae_custom_scale: float | None = option("model", None, positive(1000.0))
    vae_custom_shift: float | None = option("model", None, finite(1000.0))
    variant: str | None = option("model", None)
    revision: str | None = option("model", None)
    vae_reflection_padding: bool | None = option("model", None)

    def __post_init__(self) -> None:
        """Refuse values that an option does not take, and options that contradict each other."""
        check_options(self)
        if self.prediction_type == "flow_prediction":
            check_flow_schedule(self, "prediction_type flow_prediction")


def check_flow_schedule(options: ModelOptions, reason: str) -> None:
    """Refuse an option of the noise schedule for a network that predicts the flow, which has no such schedule.

    Args:
        options: Options of the base model.
        reason: What says that the network predicts the flow.

    Raises:
        RefusedInputError: The option is given.
    """
    if options.rescale_betas_zero_snr is not None:
        raise RefusedInputError(
            f"rescale_betas_zero_snr has no effect with {reason}, because the flow has no betas: leave it out"
        )


def check_prediction_type(value: object, source: str) -> None:
    """Refuse a word that names no prediction type.

    Args:
        value: Word of a model's own files.
        source: Name of the file, or of the place in it.

    Raises:
        ModelError: The word is not one of diffusers'.
    """
    known = get_args(PredictionType)
    if value not in known:
        raise ModelError(
            f"{source}: prediction_type must be {', '.join(known[:-1])} or {known[-1]}, got {printable(str(value))}:"
            " state it with --prediction_type"
        )


def check_model(model: str | Path, options: ModelOptions) -> None:
    """Refuse a name by which no model can be loaded, and options that the named model does not take.

    Args:
        model: Hub id, pipeline folder, `.safetensors` file, or "miniature".
        options: Options of the base model.

    Raises:
        ModelError: The model is a pickle, the path does not exist, or an option does not go with the model.
    """
    check_model_name(model, options.variant, options.revision)
    if options.tokenizer_name_or_path is not None and not is_single_file(model):
        raise ModelError(
            f"tokenizer_name_or_path is {printable(options.tokenizer_name_or_path)}, and {printable(model)} has a"
            " tokenizer of its own: leave tokenizer_name_or_path out"
        )

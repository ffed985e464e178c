"""Options of the base model: how its files are found, and what replaces their contents. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from d2f_fast.config import PredictionType, check_options, finite, option, positive
from d2f_fast.errors import ModelError, RefusedInputError, printable
from d2f_fast.models.names import check_model_name, is_single_file


@dataclass(frozen=True)
class ModelOptions:
    """Hold the options of the base model that training, sampling and the export share.

    Args:
        prediction_type: What the network predicts: "epsilon" the noise, "sample" the clean latents, "v_prediction" v,
            and "flow_prediction" the flow itself, as rectified-flow checkpoints and `d2f train --objective fm` do. The
            default None takes it from the model's own files, and the first lines that are printed say where it was
            read.
        rescale_betas_zero_snr: Whether the model was trained with zero terminal SNR, so that its last timestep is pure
            noise. --no_rescale_betas_zero_snr states that it was not. A model that predicts the flow takes neither. The
            default None takes it from the model's own files.
        tokenizer_name_or_path: Folder with CLIP's vocab.json and merges.txt, or a diffusers pipeline folder, for a
            model that is one .safetensors file, which holds no tokenizer. The default None takes the vocabulary from
            the package open_clip_torch, where it is installed.
        pretrained_vae_model_name_or_path: Autoencoder in place of the model's own: a hub id, a folder, or one
            .safetensors file, which takes its configuration from the model's own. Its latents must have as many
            channels as the UNet's. It is saved with a full finetuning. The default None keeps the model's own.
        vae_custom_scale: Factor on the autoencoder's latents, a positive number, where its configuration says another
            or none. The default None takes it from the configuration.
        vae_custom_shift: Number that is subtracted from the autoencoder's latents before the factor. It is added to the
            autoencoder's weights, because other programs ignore it. The default None takes it from the configuration.
        variant: Variant of the weight files of a folder or hub id, such as fp16. The weights are held in float32 all
            the same. The default None takes the files without a variant.
        revision: Branch, tag or commit of a hub id. The default None takes the main branch.
        vae_reflection_padding: Pad the convolutions of the autoencoder by reflection in place of zeros, as fine-tunes
            for EQ-VAE need. The setting is saved with the result, but programs other than this package ignore it there.
            --no_vae_reflection_padding pads with zeros. The default None takes what the autoencoder's configuration
            says, which for stock autoencoders is zeros.

    Raises:
        RefusedInputError: An option has a value that it does not take, or two options contradict each other.
    """

    prediction_type: PredictionType | None = option("model", None)
    rescale_betas_zero_snr: bool | None = option("model", None)
    tokenizer_name_or_path: str | None = option("model", None)
    pretrained_vae_model_name_or_path: str | None = option("model", None)
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

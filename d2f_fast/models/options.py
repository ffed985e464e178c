"""Options of the base model: how its files are found, and what replaces their contents. Imports no torch."""

from dataclasses import dataclass

from d2f_fast.config import PredictionType, check_options, option


@dataclass(frozen=True)
class ModelOptions:
    """Hold the options of the base model that training, sampling and the export share.

    Args:
        prediction_type: What the network predicts: "epsilon" the noise, "sample" the clean latents, "v_prediction" v,
            and "flow_prediction" the flow itself, as rectified-flow checkpoints and `d2f train --objective fm` do. The
            default None takes it from the model's own files, and the first lines that are printed say where it was
            read.
        rescale_betas_zero_snr: Whether the model was trained with zero terminal SNR, so that its last timestep is pure
            noise. --no_rescale_betas_zero_snr states that it was not. The default None takes it from the model's own
            files.
        tokenizer_name_or_path: Folder with CLIP's vocab.json and merges.txt, or a diffusers pipeline folder, for a
            model that is one .safetensors file, which holds no tokenizer. The default None takes the vocabulary from
            the installed package open_clip_torch (pip install 'd2f_fast[single-file]').

    Raises:
        RefusedInputError: An option has a value that it does not take.
    """

    prediction_type: PredictionType | None = option("model", None)
    rescale_betas_zero_snr: bool | None = option("model", None)
    tokenizer_name_or_path: str | None = option("model", None)

    def __post_init__(self) -> None:
        """Refuse values that an option does not take."""
        check_options(self)

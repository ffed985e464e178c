"""Read the header of a single `.safetensors` file in the original layout, and say which family of models it holds.

No tensor is read and no torch is imported, so that a file which cannot be loaded is refused at once. `families/` holds
the configuration of each family.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2f_fast.config import PredictionType
from d2f_fast.errors import CheckpointError, ModelError, printable
from d2f_fast.files.tensor_header import TensorHeader, read_tensor_header
from d2f_fast.lora.family import FAMILY_NAMES, Family
from d2f_fast.models.folder import check_real_weights

FAMILIES = Path(__file__).parent / "families"
UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
TEXT_PREFIXES: dict[Family, tuple[str, ...]] = {
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
    "sd2": ("cond_stage_model.model.",),
    "sd1": ("cond_stage_model.transformer.",),
}
_EMBEDDING = ("text_model.embeddings.token_embedding.weight", "token_embedding.weight")
# Beside the three parts, a file may hold the training code's own numbers, averages and markers.
_OTHER_KEYS = (
    *("model_ema.", "model.alphas", "denoiser.", "conditioner.", "cond_stage_model.", "edm_", "ztsnr", "v_pred"),
    *("alphas_cumprod", "betas", "sqrt_", "log_one_minus", "posterior_", "lvlb_weights", "logvar", "scale_factor"),
    *("global_step", "epoch"),
)
_MOST_FOREIGN = 0.02  # Share of unknown keys that a file may have, such as embedded textual inversions.
# Words that headers use for what a network predicts, and those of diffusers.
_PREDICTION_WORDS: dict[str, PredictionType] = {
    **dict.fromkeys(("epsilon", "eps"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "v-prediction", "v_pred"), "v_prediction"),
    "sample": "sample",
    **dict.fromkeys(("flow", "flow_prediction"), "flow_prediction"),
}
_REFUSED = {
    "edm_vpred.": "it predicts v in the EDM form (edm_vpred), whose noise levels no alignment serves",
    "edm_mean": "it predicts in the EDM form (Playground 2.5), whose noise levels no alignment serves",
    "conditioner.embedders.0.model.": "it is the refiner of SDXL, which continues the images of another model",
    "model.diffusion_model.joint_blocks.": "it is of Stable Diffusion 3, which has no UNet",
    "model.diffusion_model.double_blocks.": "it is of Flux, which has no UNet",
}


@dataclass(frozen=True)
class SingleFile:
    """Describe a single file, read from its header alone.

    Attributes:
        path: The file.
        header: Its keys, with the type and shape of each tensor, and its text entries.
        family: Family of the model.
    """

    path: Path
    header: TensorHeader
    family: Family

    @property
    def has_vae(self) -> bool:
        """Return whether the file holds an autoencoder."""
        return any(key.startswith(VAE_PREFIX) for key in self.header.tensors)

    def token_rows(self) -> int:
        """Return the number of tokens that the text encoder knows."""
        for name in _EMBEDDING:
            for prefix in TEXT_PREFIXES[self.family]:
                if (found := self.header.tensors.get(prefix + name)) is not None and found.shape:
                    return found.shape[0]
        raise ModelError(f"{printable(self.path)} holds no token embedding: give a file with every part")


def read_single_file(path: Path) -> SingleFile:
    """Read the header of a single file, and refuse one that cannot be loaded. No tensor is read.

    Args:
        path: `.safetensors` file.

    Raises:
        ModelError: The file is damaged, of another family, or lacks a text encoder or the UNet.
    """
    try:
        header = read_tensor_header(path)
    except CheckpointError as error:
        raise ModelError(str(error)) from error
    where, keys = printable(path), header.tensors
    for prefix, reason in _REFUSED.items():
        if any(key.startswith(prefix) for key in keys):
            raise ModelError(f"{where}: {reason}: give a model of SD1.x, SD2.x or SDXL")
    if keys and all(key.startswith("lora_") or ".lora_" in key for key in keys):
        raise ModelError(f"{where} is a LoRA file, and not a model: give the model that it belongs to")
    of_text = [prefix for prefixes in TEXT_PREFIXES.values() for prefix in prefixes]
    known = (UNET_PREFIX, VAE_PREFIX, *of_text, *_OTHER_KEYS)
    foreign = [key for key in keys if not key.startswith(known)]
    if not any(key.startswith(f"{UNET_PREFIX}input_blocks.") for key in keys) or len(foreign) > _MOST_FOREIGN * len(
        keys
    ):
        example = f", such as {printable(foreign[0])}" if foreign else ""
        raise ModelError(
            f"{where} is not in the original layout of Stable Diffusion: {len(foreign)} of its {len(keys)} keys are"
            f" unknown{example}; give a file of SD1.x, SD2.x or SDXL, or a pipeline folder"
        )
    weights = (UNET_PREFIX, VAE_PREFIX, *of_text)
    check_real_weights(path, {key: info for key, info in keys.items() if key.startswith(weights)})
    return SingleFile(path, header, _family(where, header))


def _family(where: str, header: TensorHeader) -> Family:
    """Return the family that the text encoder's keys name, and refuse a UNet of another family."""
    keys = header.tensors
    found = [family for family, prefixes in TEXT_PREFIXES.items() if any(key.startswith(prefixes[-1]) for key in keys)]
    if not found:
        raise ModelError(
            f"{where} holds no text encoder (no key begins with cond_stage_model. or conditioner.): give a file with"
            " every part, or a pipeline folder"
        )
    family = found[0]
    first = TEXT_PREFIXES[family][0]
    if not any(key.startswith(first) for key in keys):
        raise ModelError(f"{where} holds no {first}: give a file with every part, or a pipeline folder")
    text = family_table(family)["unet"]["cross_attention_dim"]
    for key, info in keys.items():
        if key.endswith(".attn2.to_k.weight") and info.shape[-1:] != (text,):
            raise ModelError(
                f"{where}: {printable(key)} takes text of width {info.shape[-1] if info.shape else 0}, and that of"
                f" {FAMILY_NAMES[family]}, whose text encoder the file holds, is {text}: give an intact file"
            )
    return family


def family_table(family: Family) -> dict[str, Any]:
    """Return the configuration of a family's parts by component, as the public repositories of the base models have it.

    Args:
        family: Name of the family.
    """
    table: dict[str, Any] = json.loads((FAMILIES / f"{family}.json").read_text(encoding="utf-8"))
    return table


def fitted_table(file: SingleFile) -> dict[str, Any]:
    """Return the configuration of a file's family with the numbers of channels that the file has.

    Args:
        file: File, whose header was read.
    """
    table = family_table(file.family)
    shapes = {key: info.shape for key, info in file.header.tensors.items()}
    channels = shapes.get(f"{UNET_PREFIX}input_blocks.0.0.weight", ()), shapes.get(f"{UNET_PREFIX}out.2.weight", ())
    if len(channels[0]) == 4 and len(channels[1]) == 4:
        table["unet"] |= {"in_channels": channels[0][1], "out_channels": channels[1][0]}
    latents = shapes.get(f"{VAE_PREFIX}decoder.conv_in.weight", ())
    if len(latents) == 4:
        table["vae"]["latent_channels"] = latents[1]
    return table


def stated_prediction(file: SingleFile, given: str | None = None) -> tuple[str, str] | None:
    """Return the prediction type that a file states, and where; None where it states none.

    Args:
        file: File, whose header was read.
        given: Prediction type that an option states, so that a word of the header does not count; None for none.

    Raises:
        ModelError: The header names a prediction type that is not known, and no option states another.
    """
    if "v_pred" in file.header.tensors:
        return "v_prediction", "marker v_pred"
    found = None
    for entry in ("modelspec.prediction_type", "d2f.prediction_type"):
        if (word := file.header.entries.get(entry, "").strip().lower()) and given is None:
            if word not in _PREDICTION_WORDS:
                raise ModelError(
                    f"{printable(file.path)}: {entry} in its header is {printable(word[:100])}, which is not known:"
                    " state --prediction_type"
                )
            found = _PREDICTION_WORDS[word], f"header {entry}"
    return found


def stated_zero_snr(file: SingleFile) -> tuple[bool, str] | None:
    """Return whether a file states zero terminal SNR, and where; None where it states nothing.

    Args:
        file: File, whose header was read.
    """
    if "ztsnr" in file.header.tensors:
        return True, "marker ztsnr"
    found = None
    for entry in ("ss_zero_terminal_snr", "d2f.zero_snr"):
        if (word := file.header.entries.get(entry, "").strip().lower()) in ("true", "false"):
            found = word == "true", f"header {entry}"
    return found


def check_has_vae(file: SingleFile) -> None:
    """Refuse a file without an autoencoder.

    Args:
        file: File, whose header was read.

    Raises:
        ModelError: No key is one of an autoencoder's.
    """
    if not file.has_vae:
        raise ModelError(
            f"{printable(file.path)} holds no autoencoder (no key begins with {VAE_PREFIX}): give a file with every"
            " part, a pipeline folder, or --pretrained_vae_model_name_or_path"
        )

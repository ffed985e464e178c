"""Load a single `.safetensors` file in the original layout, without the hub: SD1.x, SD2.x and SDXL.

The file says its family by its keys, and sometimes its prediction type: the empty tensors `v_pred` and `ztsnr`
(ComfyUI, NoobAI), or the header's `modelspec.prediction_type`. `families/` holds the configuration of each family.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from d2f_fast.errors import CheckpointError, ModelError, printable
from d2f_fast.files.tensor_header import TensorHeader, read_tensor_header
from d2f_fast.lora.family import FAMILY_NAMES, Family
from d2f_fast.models.clip_tokenizer import clip_tokenizer
from d2f_fast.models.facts import ModelFacts, same_schedule
from d2f_fast.models.folder import check_real_weights, half_type
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.single_file_weights import check_weights

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline

FAMILIES = Path(__file__).parent / "families"
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_TEXT: dict[Family, tuple[str, ...]] = {
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
_REFUSED = {
    "edm_vpred.": "it predicts v in the EDM form (edm_vpred), whose noise levels no alignment serves",
    "edm_mean": "it predicts in the EDM form (Playground 2.5), whose noise levels no alignment serves",
    "conditioner.embedders.0.model.": "it is the refiner of SDXL, which continues the images of another model",
    "model.diffusion_model.joint_blocks.": "it is of Stable Diffusion 3, which has no UNet",
    "model.diffusion_model.double_blocks.": "it is of Flux, which has no UNet",
}
_PREDICTION_WORDS = {
    **dict.fromkeys(("epsilon", "eps"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "v-prediction", "v_pred"), "v_prediction"),
    "sample": "sample",
    **dict.fromkeys(("flow", "flow_prediction"), "flow_prediction"),
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
        return any(key.startswith(_VAE) for key in self.header.tensors)

    def token_rows(self) -> int:
        """Return the number of tokens that the text encoder knows."""
        for name in _EMBEDDING:
            for prefix in _TEXT[self.family]:
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
    known = (_UNET, _VAE, *(prefix for prefixes in _TEXT.values() for prefix in prefixes), *_OTHER_KEYS)
    foreign = [key for key in keys if not key.startswith(known)]
    if not any(key.startswith(f"{_UNET}input_blocks.") for key in keys) or len(foreign) > _MOST_FOREIGN * len(keys):
        example = f", such as {printable(foreign[0])}" if foreign else ""
        raise ModelError(
            f"{where} is not in the original layout of Stable Diffusion: {len(foreign)} of its {len(keys)} keys are"
            f" unknown{example}; give a file of SD1.x, SD2.x or SDXL, or a pipeline folder"
        )
    weights = (_UNET, _VAE, *(prefix for prefixes in _TEXT.values() for prefix in prefixes))
    check_real_weights(path, {key: info for key, info in keys.items() if key.startswith(weights)})
    return SingleFile(path, header, _family(where, header))


def _family(where: str, header: TensorHeader) -> Family:
    """Return the family that the text encoder's keys name, and refuse a UNet of another family."""
    keys = header.tensors
    found = [family for family, prefixes in _TEXT.items() if any(key.startswith(prefixes[-1]) for key in keys)]
    if not found:
        raise ModelError(
            f"{where} holds no text encoder (no key begins with cond_stage_model. or conditioner.): give a file with"
            " every part, or a pipeline folder"
        )
    family = found[0]
    first = _TEXT[family][0]
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


def read_facts(file: SingleFile, options: ModelOptions) -> ModelFacts:
    """Return what a single file says of its model: its marker keys come first, then its header, then the family.

    Args:
        file: File, whose header was read.
        options: Options of the base model; what they state is not read from the header.

    Raises:
        ModelError: The header names a prediction type that is not known, and no option states another.
    """
    keys, entries, name = file.header.tensors, file.header.entries, FAMILY_NAMES[file.family]
    assumed = f"assumed for {name}, as the file has no marker"
    prediction = family_table(file.family)["scheduler"]["prediction_type"], assumed
    if file.family == "sd2":
        prediction = prediction[0], f"{assumed}; state --prediction_type epsilon for a relative of SD2-base"
    zero_snr = False, assumed
    for entry in ("modelspec.prediction_type", "d2f.prediction_type"):
        if (word := entries.get(entry, "").strip().lower()) and options.prediction_type is None:
            if word not in _PREDICTION_WORDS:
                raise ModelError(
                    f"{printable(file.path)}: {entry} in its header is {printable(word[:100])}, which is not known:"
                    " state --prediction_type"
                )
            prediction = _PREDICTION_WORDS[word], f"header {entry}"
    for entry in ("ss_zero_terminal_snr", "d2f.zero_snr"):
        if (word := entries.get(entry, "").strip().lower()) in ("true", "false"):
            zero_snr = word == "true", f"header {entry}"
    if "v_pred" in keys:
        prediction = "v_prediction", "marker v_pred"
    if "ztsnr" in keys:
        zero_snr = True, "marker ztsnr"
    return ModelFacts(name, *prediction, *zero_snr)


def load_single_file(
    file: SingleFile,
    dtype: torch.dtype,
    options: ModelOptions,
    vae: "AutoencoderKL | AutoencoderTiny | None" = None,
    *,
    unet_as_stored: bool = False,
) -> tuple["DiffusionPipeline", ModelFacts]:
    """Load the pipeline of a single file, and return it with what the file says of its model.

    Args:
        file: File, whose header was read.
        dtype: Type of the weights.
        options: Options of the base model, of which the tokenizer's is used here.
        vae: Autoencoder in place of the file's own; None takes that of the file.
        unet_as_stored: Whether the UNet keeps its weights in half precision where the file has them so.

    Raises:
        ModelError: A part is missing, or there is no tokenizer.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

    if vae is None and not file.has_vae:
        raise ModelError(
            f"{printable(file.path)} holds no autoencoder (no key begins with {_VAE}): give a file with every part, a"
            " pipeline folder, or --pretrained_vae_model_name_or_path"
        )
    facts, table = read_facts(file, options), family_table(file.family)
    length = table["text_encoder"]["max_position_embeddings"]
    parts: dict[str, Any] = {
        name: clip_tokenizer(options.tokenizer_name_or_path, pad_token, length, file.token_rows())
        for name, pad_token in table.pop("pad_tokens").items()
    }
    if vae is not None:
        parts["vae"] = vae
    kind: type[DiffusionPipeline] = StableDiffusionXLPipeline if file.family == "sdxl" else StableDiffusionPipeline
    table = _fitted(table, file, facts)
    shapes = {key: info.shape for key, info in file.header.tensors.items()}
    check_weights(printable(file.path), facts.family, shapes, table, _TEXT[file.family], with_vae=vae is None)
    with tempfile.TemporaryDirectory() as folder:
        _write_configs(Path(folder), table)
        weights = (info for key, info in file.header.tensors.items() if key.startswith(_UNET))
        if unet_as_stored and (stored := half_type(weights)) is not None:
            config = {"config": folder, "subfolder": "unet"}
            parts["unet"] = UNet2DConditionModel.from_single_file(str(file.path), dtype=stored, **config)
        pipeline = kind.from_single_file(str(file.path), config=folder, dtype=dtype, **parts)
    stated = {"prediction_type": facts.prediction_type, "rescale_betas_zero_snr": facts.zero_snr}
    pipeline.scheduler = same_schedule(pipeline.scheduler, type(pipeline.scheduler), **stated)
    return pipeline, facts


def _fitted(table: dict[str, Any], file: SingleFile, facts: ModelFacts) -> dict[str, Any]:
    """Return a family's configuration with the numbers of channels that the file has."""
    shapes = {key: info.shape for key, info in file.header.tensors.items()}
    channels = shapes.get(f"{_UNET}input_blocks.0.0.weight", ()), shapes.get(f"{_UNET}out.2.weight", ())
    if len(channels[0]) == 4 and len(channels[1]) == 4:
        table["unet"] |= {"in_channels": channels[0][1], "out_channels": channels[1][0]}
    latents = shapes.get(f"{_VAE}decoder.conv_in.weight", ())
    if len(latents) == 4:
        table["vae"]["latent_channels"] = latents[1]
    if file.family == "sd2" and facts.prediction_type == "epsilon":
        table["unet"]["sample_size"] = 64  # SD2-base was trained at 512 pixels, and its v-prediction at 768.
    return table


def _write_configs(folder: Path, table: Mapping[str, Any]) -> None:
    """Write a family's configuration as a diffusers folder without weights."""
    for name, config in table.items():
        if name == "model_index":
            path = folder / "model_index.json"
        else:
            (folder / name).mkdir()
            path = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        path.write_text(json.dumps(config), encoding="utf-8")

"""Load a single `.safetensors` file in the original layout, without the hub: SD1.x, SD2.x and SDXL.

The file says its family by its keys, and sometimes its prediction type: the empty tensors `v_pred` and `ztsnr`
(ComfyUI, NoobAI), or the header's `modelspec.prediction_type`.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from d2f_fast.errors import printable
from d2f_fast.lora.family import FAMILY_NAMES
from d2f_fast.models.clip_tokenizer import clip_tokenizer
from d2f_fast.models.facts import ModelFacts, same_schedule
from d2f_fast.models.folder import half_type
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.single_file_header import (
    TEXT_PREFIXES,
    UNET_PREFIX,
    SingleFile,
    check_has_vae,
    family_table,
    fitted_table,
    stated_prediction,
    stated_zero_snr,
)
from d2f_fast.models.single_file_weights import check_weights

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline


def read_facts(file: SingleFile, options: ModelOptions) -> ModelFacts:
    """Return what a single file says of its model: its marker keys come first, then its header, then the family.

    Args:
        file: File, whose header was read.
        options: Options of the base model; what they state is not read from the header.

    Raises:
        ModelError: The header names a prediction type that is not known, and no option states another.
    """
    name = FAMILY_NAMES[file.family]
    assumed = f"assumed for {name}, as the file has no marker"
    prediction = stated_prediction(file, options.prediction_type)
    if prediction is None:
        cure = "; state --prediction_type epsilon for a relative of SD2-base" if file.family == "sd2" else ""
        prediction = family_table(file.family)["scheduler"]["prediction_type"], f"{assumed}{cure}"
    return ModelFacts(name, *prediction, *(stated_zero_snr(file) or (False, assumed)))


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

    if vae is None:
        check_has_vae(file)
    facts, table = read_facts(file, options), fitted_table(file)
    length = table["text_encoder"]["max_position_embeddings"]
    parts: dict[str, Any] = {
        name: clip_tokenizer(options.tokenizer_name_or_path, pad_token, length, file.token_rows())
        for name, pad_token in table.pop("pad_tokens").items()
    }
    if vae is not None:
        parts["vae"] = vae
    kind: type[DiffusionPipeline] = StableDiffusionXLPipeline if file.family == "sdxl" else StableDiffusionPipeline
    if file.family == "sd2" and facts.prediction_type == "epsilon":
        table["unet"]["sample_size"] = 64  # SD2-base was trained at 512 pixels, and its v-prediction at 768.
    shapes = {key: info.shape for key, info in file.header.tensors.items()}
    check_weights(printable(file.path), facts.family, shapes, table, TEXT_PREFIXES[file.family], with_vae=vae is None)
    with tempfile.TemporaryDirectory() as folder:
        _write_configs(Path(folder), table)
        weights = (info for key, info in file.header.tensors.items() if key.startswith(UNET_PREFIX))
        if unet_as_stored and (stored := half_type(weights)) is not None:
            config = {"config": folder, "subfolder": "unet"}
            parts["unet"] = UNet2DConditionModel.from_single_file(str(file.path), dtype=stored, **config)
        pipeline = kind.from_single_file(str(file.path), config=folder, dtype=dtype, **parts)
    stated = {"prediction_type": facts.prediction_type, "rescale_betas_zero_snr": facts.zero_snr}
    pipeline.scheduler = same_schedule(pipeline.scheduler, type(pipeline.scheduler), **stated)
    return pipeline, facts


def _write_configs(folder: Path, table: Mapping[str, Any]) -> None:
    """Write a family's configuration as a diffusers folder without weights."""
    for name, config in table.items():
        if name == "model_index":
            path = folder / "model_index.json"
        else:
            (folder / name).mkdir()
            path = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        path.write_text(json.dumps(config), encoding="utf-8")

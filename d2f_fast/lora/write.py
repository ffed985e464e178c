"""Write LoRA files to share, and check that the same adapter is read from them."""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from d2f_fast.config import LoraFormat
from d2f_fast.files.atomic import StrPath, atomic_path, make_folder
from d2f_fast.files.tensor_file import write_tensors
from d2f_fast.lora.inject import ADAPTER, lora_layers
from d2f_fast.lora.key_names import text_module
from d2f_fast.lora.kohya import kohya_header, kohya_state_dict
from d2f_fast.lora.layer_weights import LoraLayerWeights
from d2f_fast.lora.reload import check_kohya_file, check_peft_file, check_text_layers, uniform_scale_metadata
from d2f_fast.lora.scales import ADAPTER_METADATA
from d2f_fast.lora.source import KOHYA_ENDING, LORA_FILE


@torch.no_grad()
def lora_state_dict(
    unet: nn.Module, text_layers: Mapping[str, LoraLayerWeights] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the header of a LoRA file: peft's keys, alpha = rank, and the scale folded into lora_B.

    Every version of diffusers reads such a file correctly, with or without its header.

    Args:
        unet: UNet with an adapter from `inject_lora`.
        text_layers: Updates of text encoders with alpha = rank, by their names "text_encoder.<module>" and
            "text_encoder_2.<module>", which are written as they are; None for none.
    """
    layers = lora_layers(unet)
    tensors = {}
    for key, value in get_peft_model_state_dict(unet, adapter_name=ADAPTER).items():
        module, _, kind = key.partition(".lora_")
        scaling = layers[module].scaling[ADAPTER]
        folds = kind.startswith("B") and scaling != 1
        tensors[f"unet.{key}"] = (value * scaling if folds else value).clone()
    metadata = uniform_scale_metadata({name: layer.r[ADAPTER] for name, layer in layers.items()})
    ranks: dict[str, dict[str, int]] = {}
    for name, text_layer in (text_layers or {}).items():
        component, _, module = name.partition(".")
        key = f"{component}.{text_module(module)}"
        tensors |= {f"{key}.lora_A.weight": text_layer.down.clone(), f"{key}.lora_B.weight": text_layer.up.clone()}
        # As endings, names without "text_model." fit the modules of transformers 4 and 5.
        ranks.setdefault(component, {})[module] = text_layer.rank
    for component, of_component in ranks.items():
        metadata |= uniform_scale_metadata(of_component, component)
    return tensors, {"format": "pt", ADAPTER_METADATA: json.dumps(metadata, sort_keys=True)}


def save_lora(
    unet: UNet2DConditionModel,
    folder: StrPath,
    metadata: Mapping[str, str] | None = None,
    *,
    lora_format: LoraFormat = "diffusers",
    prediction_type: str = "epsilon",
    text_layers: Mapping[str, LoraLayerWeights] | None = None,
) -> Path:
    """Write an adapter to LoRA files, read each of them back, and compare one forward pass.

    `pytorch_lora_weights.safetensors` is read by diffusers, `<name of the folder>_kohya.safetensors` by kohya's
    scripts, ComfyUI, A1111 and Forge. Two saves of the same adapter are equal byte for byte. An error leaves the files
    that were there before.

    Args:
        unet: UNet with an adapter from `inject_lora`.
        folder: Folder of the files, made when missing.
        metadata: Further text entries of the header; None for none.
        lora_format: Which of the two files is written, or "both".
        prediction_type: What the network predicts, which the header of the kohya file says.
        text_layers: Updates of text encoders that are written beside the adapter; see `lora_state_dict`.

    Returns:
        The file for diffusers, or the kohya file where only that one is written.

    Raises:
        CheckpointError: A weight is not finite.
        RefusedInputError: The folder cannot be made, or the disk is full.
        ModelError: A file that was read back does not give the same output.
    """
    folder = make_folder(folder)
    tensors, header = lora_state_dict(unet, text_layers)
    tags = dict(metadata or {})
    written: list[Path] = []
    with ExitStack() as stack:

        def write(
            path: Path,
            tensors: Mapping[str, Tensor],
            header: Mapping[str, str],
            check: Callable[[UNet2DConditionModel, StrPath], None],
        ) -> None:
            temporary = stack.enter_context(atomic_path(path))
            write_tensors(temporary, tensors, {**header, **tags})
            check(unet, temporary)
            check_text_layers(temporary, text_layers or {})
            written.append(path)

        if lora_format != "kohya":
            write(folder / LORA_FILE, tensors, header, check_peft_file)
        if lora_format != "diffusers":
            name = folder.resolve().name or "lora"  # The root of a disk has no name.
            entries = {"format": "pt"} | kohya_header(unet, tensors, name, prediction_type)
            write(folder / f"{name}{KOHYA_ENDING}", kohya_state_dict(unet, tensors), entries, check_kohya_file)
    return written[0]

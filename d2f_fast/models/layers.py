"""Find the layers of a model that a LoRA can adapt from the headers of its files, and refuse a LoRA that does not fit.

No tensor is read and no torch is imported, so that a LoRA of another model is refused before the model is loaded.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from d2f_fast.files.tensor_header import TensorInfo, read_tensor_header
from d2f_fast.lora.fit import ModelLayers, fitted_layers
from d2f_fast.lora.header import LoraHeader, read_lora_header
from d2f_fast.lora.original_names import diffusers_unet_name
from d2f_fast.lora.source import parse_lora
from d2f_fast.lora.targets import FIRST_LAYER, LAST_LAYER
from d2f_fast.models.configs import TEXT_ENCODERS, model_folder
from d2f_fast.models.folder import read_config, weight_files
from d2f_fast.models.names import is_single_file
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.single_file_header import UNET_PREFIX, fitted_table, read_single_file

_EMBEDDINGS = ("embeddings.", "text_model.embeddings.")
_FIRST, _LAST = f"unet.{FIRST_LAYER}", f"unet.{LAST_LAYER}"
_Shapes = dict[str, tuple[int, ...]]


def check_lora_fits(lora: Iterable[str], model: str, options: ModelOptions, images: int = 0) -> list[LoraHeader]:
    """Refuse LoRA files that cannot be used, or not with a model, and return their headers.

    Args:
        lora: LoRA as PATH or PATH:SCALE.
        model: Hub id, pipeline folder, `.safetensors` file, or "miniature", whose files were checked. The LoRA are not
            compared with a hub id, unless nothing may be downloaded.
        options: Options of the model.
        images: Number of images whose latents the network sees beside its own; see `model_layers`.

    Raises:
        ModelError: A LoRA holds another kind of adapter, or is one of another model.
        CheckpointError: A LoRA is missing, damaged, or a pickle.
    """
    headers = [read_lora_header(parse_lora(entry).path) for entry in lora]
    if headers and (layers := model_layers(model, options, images)) is not None:
        for header in headers:
            fitted_layers(header, layers)
    return headers


def model_layers(model: str, options: ModelOptions, images: int = 0) -> ModelLayers | None:
    """Return the layers of a model.

    Args:
        model: Hub id, pipeline folder, `.safetensors` file, or "miniature", whose files were checked.
        options: Options of the model.
        images: Number of images whose latents the network sees beside its own, for which a text-to-image network is
            widened; 0 leaves the network as it is.

    Returns:
        The layers; None for a hub id, whose files may have to be downloaded first, and for a UNet of another class.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    if is_single_file(model):
        found = _layers_of_file(Path(model))
    elif (folder := model_folder(model, options)) is not None:
        found = _layers_of_folder(folder, options.variant)
    else:
        return None
    return None if _FIRST not in found.shapes or _LAST not in found.shapes else _widened(found, images)


def _layers_of_folder(folder: Path, variant: str | None) -> ModelLayers:
    """Return the layers of a pipeline folder."""
    index = read_config(folder / "model_index.json")
    shapes: _Shapes = {}
    unknown = set()
    for component in ("unet", *TEXT_ENCODERS):
        if (index.get(component) or [None])[-1] is None:
            continue
        found = _weights(folder / component, variant)
        if component == "unet" and index["unet"][-1] != "UNet2DConditionModel":
            found = {}
        if component != "unet":
            bare = {name.removeprefix("text_model."): shape for name, shape in found.items()}
            found = {name: shape for name, shape in bare.items() if not name.startswith(_EMBEDDINGS)}
            if not any(name.startswith("encoder.layers.") for name in found):
                unknown.add(component)  # It is a text encoder other than CLIP.
        shapes |= {f"{component}.{name}": shape for name, shape in found.items()}
    return ModelLayers(shapes, read_config(folder / "unet" / "config.json"), frozenset(unknown))


def _weights(folder: Path, variant: str | None) -> _Shapes:
    """Return the shapes of the matrices and kernels of a component, by the names of their layers."""
    headers = (read_tensor_header(path) for path in weight_files(folder, variant))
    return _matrices({key: info for header in headers for key, info in header.tensors.items()})


def _matrices(tensors: Mapping[str, TensorInfo]) -> _Shapes:
    """Return the shapes of the tensors that are matrices or kernels, by the names of their layers."""
    return {
        key.removesuffix(".weight"): info.shape
        for key, info in tensors.items()
        if key.endswith(".weight") and len(info.shape) in (2, 4)
    }


def _layers_of_file(path: Path) -> ModelLayers:
    """Return the layers of a single file; those of its text encoders, which no file may change, are its family's."""
    file = read_single_file(path)
    table = fitted_table(file)
    shapes: _Shapes = {}
    for name, shape in _matrices(file.header.tensors).items():
        if name.startswith(UNET_PREFIX):
            known = diffusers_unet_name(name.removeprefix(UNET_PREFIX), table["unet"])
            shapes |= {} if known is None else {f"unet.{known}": shape}
    for component in TEXT_ENCODERS:
        if component in table:
            shapes |= {f"{component}.{name}": shape for name, shape in _clip_layers(table[component]).items()}
    if (second := table.get("text_encoder_2")) is not None:
        shapes["text_encoder_2.text_projection"] = (second["projection_dim"], second["hidden_size"])
    return ModelLayers(shapes, table["unet"])


def _clip_layers(config: Mapping[str, Any]) -> _Shapes:
    """Return the shapes of the layers of CLIP's text encoder."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    leaves = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
    leaves |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    return {
        f"encoder.layers.{number}.{leaf}": shape
        for number in range(config["num_hidden_layers"])
        for leaf, shape in leaves.items()
    }


def _widened(layers: ModelLayers, images: int) -> ModelLayers:
    """Return the layers of a network whose first convolution takes the latents of images; see `widen_conv_in`."""
    (rows, channels, *kernel), latents = layers.shapes[_FIRST], layers.shapes[_LAST][0]
    if channels != latents:
        return layers
    return ModelLayers(
        {**layers.shapes, _FIRST: (rows, channels * (1 + images), *kernel)}, layers.unet_config, layers.unknown
    )

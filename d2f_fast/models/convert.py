"""Convert a model between a diffusers folder and a single file in the original layout.

A folder is converted one tensor at a time; a single file is loaded as a whole.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from d2f_fast.errors import CheckpointError, ModelError, printable
from d2f_fast.files.atomic import StrPath, atomic_folder
from d2f_fast.files.json_file import read_json, write_json
from d2f_fast.files.tensor_header import read_tensor_header
from d2f_fast.files.tensor_stream import LazyTensor, lazy_tensors, write_tensor_stream
from d2f_fast.flow.scheduler_config import NUM_TRAIN_TIMESTEPS, predicts_flow
from d2f_fast.lora.family import Family, family_of_config
from d2f_fast.lora.fit import fitted_layers
from d2f_fast.lora.key_names import layers_of
from d2f_fast.lora.kohya import STABILITY, architecture, prediction_name
from d2f_fast.lora.layer_weights import LayerWeights
from d2f_fast.lora.read import read_lora
from d2f_fast.lora.tags import predicts_depth, starts_from_zeros
from d2f_fast.models.depth_start import set_start
from d2f_fast.models.folder import check_real_weights
from d2f_fast.models.load import load_pipeline, local_source
from d2f_fast.models.names import PICKLE_SUFFIXES
from d2f_fast.models.options import ModelOptions, check_flow_schedule, check_prediction_type
from d2f_fast.models.original_layout import original_tensors
from d2f_fast.models.reflection_padding import CONFIG_ENTRY
from d2f_fast.models.save import save_pipeline_folder
from d2f_fast.models.skeleton import skeleton_of_folder
from d2f_fast.models.tags import TAGS_FILE, saved_tags, stated_steps

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Options that state what the scheduler's configuration may be wrong about.
_STATED = ("prediction_type", "rescale_betas_zero_snr")
# Tags that are wrong once another prediction type or schedule is stated.
_TAGS_OF_PREDICTION = ("d2f.prediction_type", "d2f.fm_form", "d2f.zero_snr", "d2f.recommended_sigmas")
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_WEIGHT_FILE = re.compile(r"(?:diffusion_pytorch_model|model)(\.\w+)?(?:-\d+-of-(\d+))?\.safetensors")
# What a single file does not say, so that every program takes it from the family.
_SCALING_FACTORS: dict[Family, float] = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
_SCHEDULE = {
    "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


@dataclass(frozen=True)
class ModelWeights:
    """Tensors and configuration of a model.

    Attributes:
        source: The model, as it was named.
        components: Tensors of the UNet, the autoencoder and the text encoders, by component and key in diffusers.
        configs: Configuration of "unet", "vae" and "scheduler".
        tags: Entries that begin with "d2f.": how the model was trained and is to be sampled.
    """

    source: str
    components: dict[str, dict[str, LazyTensor]]
    configs: dict[str, Mapping[str, Any]]
    tags: dict[str, str]

    @property
    def title(self) -> str:
        """Return the name of the model, without its folder and ending; that of the run for the result of a run."""
        path = Path(self.source).resolve()
        name = path.parent.name if path.name == "pipeline" else path.name
        return name.removesuffix(".safetensors")

    @property
    def family(self) -> Family | None:
        """Return the model's family, or None where it is of none that other programs know."""
        return family_of_config(self.configs["unet"])

    @property
    def prediction_type(self) -> str:
        """Return what the network predicts, in diffusers' words."""
        config = self.configs["scheduler"]
        return "flow_prediction" if predicts_flow(config) else str(config.get("prediction_type", "epsilon"))

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the UNet's weights; the larger one where there are two."""
        return max((tensor.dtype for tensor in self.components["unet"].values()), key=lambda dtype: dtype.itemsize)


def read_model(model: str, options: ModelOptions | None = None) -> ModelWeights:
    """Return the tensors of a model; those of a folder are read only when they are needed.

    Args:
        model: Pipeline folder, hub id, or `.safetensors` file with every part.
        options: What replaces the prediction type and the schedule of the model; None for nothing.

    Raises:
        ModelError: The model is a pickle, or a part of it is missing or unreadable.
        CheckpointError: A file of a folder is damaged.
    """
    folder = Path(model)
    options = options or ModelOptions()
    if not can_stream(model, options):
        source = local_source(model, options)
        return weights_of_pipeline(
            load_pipeline(model, stored_dtype(model), options), model, tags_of_model(source, options)
        )
    index = read_json(folder / "model_index.json")
    if not isinstance(index, dict):
        raise ModelError(f"{folder / 'model_index.json'} is not a JSON object: restore it from the base model")
    parts = [name for name in _PARTS if (index.get(name) or [None])[0] is not None]
    if "unet" not in parts or "vae" not in parts:
        raise ModelError(f"{folder} has no unet or no vae: give the folder of a Stable Diffusion pipeline")
    configs = {name: read_json(folder / name / "config.json") for name in ("unet", "vae")}
    configs["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    for name, config in configs.items():
        if not isinstance(config, dict):
            raise ModelError(f"{folder / name}: its configuration is not a JSON object: restore it from the base model")
    stated = {name: value for name, value in asdict(options).items() if value is not None and name in _STATED}
    configs["scheduler"] = {**configs["scheduler"], **stated}
    prediction_type = configs["scheduler"].get("prediction_type", "epsilon")
    check_prediction_type(prediction_type, f"{folder}: scheduler_config.json")
    if prediction_type == "flow_prediction":
        check_flow_schedule(options, "a model that predicts the flow")
    components = {name: _named_as_in_diffusers(name, _component_tensors(folder / name)) for name in parts}
    return ModelWeights(model, components, configs, tags_of_model(model, options))


def can_stream(model: str, options: ModelOptions) -> bool:
    """Return whether a model is a folder whose tensors can be read one at a time, none of them replaced.

    Args:
        model: Pipeline folder, hub id, or `.safetensors` file.
        options: Options of the model.
    """
    replaced = {name for name, value in asdict(options).items() if value is not None} - {*_STATED}
    return Path(model).is_dir() and not replaced


def weights_of_pipeline(pipeline: "DiffusionPipeline", source: str, tags: Mapping[str, str]) -> ModelWeights:
    """Return the tensors of a pipeline that is in memory.

    Args:
        pipeline: Pipeline of any Stable Diffusion model.
        source: The model's name, for messages.
        tags: Entries that begin with "d2f.".
    """
    parts = {name: part for name in _PARTS if (part := getattr(pipeline, name, None)) is not None}
    components = {
        name: _named_as_in_diffusers(name, {key: LazyTensor.of(value) for key, value in part.state_dict().items()})
        for name, part in parts.items()
    }
    configs: dict[str, Mapping[str, Any]] = {
        name: dict(getattr(pipeline, name).config) | {"_class_name": type(getattr(pipeline, name)).__name__}
        for name in ("unet", "vae", "scheduler")
    }
    return ModelWeights(source, components, configs, dict(tags))


def with_lora(
    model: ModelWeights, loras: Sequence[tuple[StrPath, float]], dtype: torch.dtype | None = None
) -> ModelWeights:
    """Return a model of a folder with LoRA files merged into it, each weight when it is written.

    Args:
        model: Model that was read from a folder.
        loras: LoRA files or folders, each with the factor on its update; they are merged in this order.
        dtype: Type of the result; None keeps that of each tensor. The sums are computed in float32 and rounded once.

    Raises:
        ModelError: A LoRA is not of this model.
        CheckpointError: A LoRA file is missing, damaged, or a pickle.
    """
    networks = skeleton_of_folder(Path(model.source))
    layers = layers_of(networks)
    changes: dict[tuple[str, str], list[tuple[LayerWeights, float]]] = {}
    for source, scale in loras:
        lora = read_lora(source)
        for name, known in fitted_layers(lora.about, layers).items():
            component, _, layer = known.partition(".")
            key = f"{layer}.weight"
            if component != "unet" and key not in model.components[component]:
                key = f"text_model.{key}"
            changes.setdefault((component, key), []).append((lora.layers[name], scale))
    components = {name: dict(tensors) for name, tensors in model.components.items()}
    for (component, key), updates in changes.items():
        tensor = components[component][key]
        merged = LazyTensor(tensor.shape, torch.float32, partial(_merged_weight, tensor, updates))
        components[component][key] = merged.to(dtype or tensor.dtype)
    return replace(model, components=components)


def write_single_file(model: ModelWeights, path: Path, dtype: torch.dtype | None = None) -> list[str]:
    """Write a model as one `.safetensors` file in the original layout, whole or not at all.

    Args:
        model: Model to write.
        path: File to write or replace.
        dtype: Type of the weights; None keeps that of each tensor.

    Returns:
        What the file cannot say, and other programs will not know: sentences for the user.

    Raises:
        ModelError: The model is of no family that other programs know, or a part of it is missing or foreign.
        CheckpointError: A weight is not finite, or too large for the type; nothing is written.
        RefusedInputError: The disk is full.
    """
    if model.family is None:
        raise ModelError(
            f"{printable(model.source)} is neither Stable Diffusion 1.x, 2.x nor SDXL, for which alone the original"
            " layout has names: keep it as a diffusers folder"
        )
    kind = str(model.configs["vae"].get("_class_name", "AutoencoderKL"))
    if kind != "AutoencoderKL":
        raise ModelError(f"{printable(model.source)}: the original layout has no names for the autoencoder {kind}")
    is_v_prediction = model.prediction_type == "v_prediction"
    tensors = original_tensors(
        model.family,
        model.components,
        model.configs,
        is_v_prediction=is_v_prediction,
        zero_snr=bool(model.configs["scheduler"].get("rescale_betas_zero_snr")),
    )
    entries = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture(model.family, is_v_prediction),
        "modelspec.implementation": STABILITY,
        "modelspec.title": model.title,
        "modelspec.prediction_type": prediction_name(model.prediction_type),
    }
    write_tensor_stream(path, {key: tensor.to(dtype) for key, tensor in tensors.items()}, entries | model.tags)
    return _losses(model, model.family)


def write_folder(
    pipeline: "DiffusionPipeline", path: Path, dtype: torch.dtype, tags: Mapping[str, str], *, overwrite: bool = False
) -> None:
    """Write a pipeline as a diffusers folder, whole or not at all.

    Args:
        pipeline: Pipeline to write; its weights are converted to `dtype`.
        path: Folder to make.
        dtype: Type of the weights.
        tags: Entries of `d2f.json`, which is left out where there are none.
        overwrite: Whether an existing folder is replaced.

    Raises:
        RefusedInputError: The folder exists and `overwrite` is False, the tags state no usable number of steps, or the
            disk is full.
        CheckpointError: A weight is not finite, or too large for the type; nothing is written.
    """
    set_start(pipeline.unet, from_zeros=starts_from_zeros(tags))
    if predicts_depth(tags) and hasattr(pipeline, "default_denoising_steps"):
        from d2f_fast.models.marigold import set_default_steps  # It imports diffusers' pipelines.

        for steps in stated_steps({TAGS_FILE: tags}).values():
            set_default_steps(pipeline, steps)
    with atomic_folder(path, replace=overwrite) as temporary:
        for name in _PARTS:
            if (part := getattr(pipeline, name, None)) is not None:
                part.to(dtype)
                _refuse_infinite(path, name, part)
        save_pipeline_folder(pipeline, temporary)
        if tags:
            write_json(temporary / TAGS_FILE, dict(tags))


def stored_dtype(model: str) -> torch.dtype:
    """Return the type of a model's weights on the disk; float32 for a hub id.

    Args:
        model: Pipeline folder, hub id, or `.safetensors` file with every part.

    Raises:
        CheckpointError: The file is missing, damaged, or a pickle.
    """
    path = Path(model)
    if path.is_dir():
        return read_model(model).dtype
    if path.suffix != ".safetensors":
        return torch.float32
    tensors, _ = lazy_tensors(path)
    found = [tensor.dtype for tensor in tensors.values() if tensor.dtype.is_floating_point and len(tensor.shape) > 1]
    largest = max(found, key=lambda dtype: dtype.itemsize, default=torch.float32)
    return largest if largest.itemsize > 1 else torch.float16


def tags_of_model(model: str, options: ModelOptions | None = None) -> dict[str, str]:
    """Return the tags of a model, less those that options contradict; see `saved_tags`.

    Args:
        model: Pipeline folder, `.safetensors` file, or "miniature".
        options: Options of the model. Tags that those on its prediction and its schedule contradict are left out. The
            default None leaves none out.

    Raises:
        ModelError: `d2f.json` is not a JSON object.
        CheckpointError: The file is missing, damaged, or a pickle.
    """
    tags, options = saved_tags(model), options or ModelOptions()
    stated: dict[str, str | None] = {"d2f.prediction_type": options.prediction_type}
    if options.rescale_betas_zero_snr is not None:
        stated["d2f.zero_snr"] = str(options.rescale_betas_zero_snr).lower()
    if any(value not in (None, tags.get(name)) for name, value in stated.items()):
        tags = {name: value for name, value in tags.items() if name not in _TAGS_OF_PREDICTION}
    return tags


def _refuse_infinite(path: Path, component: str, module: nn.Module) -> None:
    """Refuse weights that are not finite, as those that are too large for their type."""
    for key, tensor in module.state_dict().items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{printable(path)}: {key} of the {component} holds NaN, infinity or a number too large for"
                f" {str(tensor.dtype).removeprefix('torch.')}, and nothing is written: give an intact model, or a type"
                " of larger range (bf16, fp32)"
            )


def _component_tensors(folder: Path) -> dict[str, LazyTensor]:
    """Return the tensors of one component's folder: those of its full files, or else of a single variant."""
    variants: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if found := _WEIGHT_FILE.fullmatch(path.name):
            variants.setdefault(found[1] or "", []).append(path)
    if not variants:
        is_pickle = any(path.suffix in PICKLE_SUFFIXES for path in folder.glob("*"))
        problem = "holds a pickle, which can run code" if is_pickle else "holds no weights"
        raise ModelError(f"{printable(folder)} {problem}: give the model as safetensors")
    files = variants.get("") or variants.get(".fp16") or next(iter(variants.values()))
    parts = {int(found[2] or 1) for path in files if (found := _WEIGHT_FILE.fullmatch(path.name))}
    if max(parts) > len(files):
        raise ModelError(
            f"{printable(folder)} holds {len(files)} of {max(parts)} files of its weights: copy the others"
        )
    tensors: dict[str, LazyTensor] = {}
    for path in files:
        check_real_weights(path, read_tensor_header(path).tensors)
        tensors |= lazy_tensors(path)[0]
    return tensors


def _named_as_in_diffusers(component: str, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return tensors by the keys that `original_tensors` expects, whatever version of transformers wrote them."""
    if not component.startswith("text_encoder"):
        return dict(tensors)
    kept = {key: tensor for key, tensor in tensors.items() if not key.endswith("position_ids")}
    prefixes = ("text_model.", "text_projection.")
    return {key if key.startswith(prefixes) else f"text_model.{key}": tensor for key, tensor in kept.items()}


@torch.no_grad()
def _merged_weight(tensor: LazyTensor, updates: Sequence[tuple[LayerWeights, float]]) -> Tensor:
    """Return a weight with the updates of several LoRA, in float32."""
    weight = tensor.load().float()
    for layer, scale in updates:
        weight = weight + scale * layer.delta(weight).reshape(weight.shape)
    return weight


def _losses(model: ModelWeights, family: Family) -> list[str]:
    """Return what a single file cannot say of a model."""
    scaling, scheduler = model.configs["vae"].get("scaling_factor", 0.18215), model.configs["scheduler"]
    losses = []
    if scaling != _SCALING_FACTORS[family]:
        losses.append(f"the autoencoder's scaling factor {scaling}; other programs take {_SCALING_FACTORS[family]}")
    if model.configs["vae"].get(CONFIG_ENTRY) or model.tags.get("d2f.vae_reflection_padding") == "true":
        losses.append("the autoencoder's padding by reflection; other programs pad by zeros")
    if model.prediction_type not in ("epsilon", "v_prediction"):
        losses.append(f"the prediction type {model.prediction_type}, which no program reads: choose it there by hand")
    elif any(scheduler.get(name, value) != value for name, value in _SCHEDULE.items()):
        losses.append("the noise schedule, which is not that of Stable Diffusion; other programs take that one")
    return [f"a single file cannot hold {loss}" for loss in losses]

"""Load a diffusers pipeline from a hub id, a folder or a single safetensors file. No pickle is ever read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError

from d2f_fast.errors import ModelError, printable
from d2f_fast.miniature import load_miniature
from d2f_fast.models.autoencoder import check_fits, load_autoencoder, prepare_autoencoder
from d2f_fast.models.facts import ModelFacts, state_facts
from d2f_fast.models.folder import cached_folder, check_folder, read_config, unet_half_type
from d2f_fast.models.names import MINIATURE, is_single_file
from d2f_fast.models.options import ModelOptions, check_model
from d2f_fast.models.single_file import load_single_file
from d2f_fast.models.single_file_header import family_table, read_single_file
from d2f_fast.models.tags import TAGS_FILE, check_sampling_tags

# What is never loaded of a folder or a hub id: pickles, and the safety checker.
_LOADING = {"use_safetensors": True, "safety_checker": None, "requires_safety_checker": False}


class LoadedModel(NamedTuple):
    """A loaded pipeline, and what its model is taken for."""

    pipeline: DiffusionPipeline
    facts: ModelFacts


def load_pipeline(
    model: str | Path, dtype: torch.dtype = torch.float32, options: ModelOptions | None = None
) -> DiffusionPipeline:
    """Load the diffusers pipeline of a model, without its safety checker; see `load_model`."""
    return load_model(model, dtype, options).pipeline


def load_model(
    model: str | Path,
    dtype: torch.dtype = torch.float32,
    options: ModelOptions | None = None,
    *,
    unet_as_stored: bool = False,
) -> LoadedModel:
    """Load the diffusers pipeline of a model, without its safety checker, and say what the model is taken for.

    Args:
        model: Hub id, pipeline folder, `.safetensors` file with every part, or "miniature" for the embedded miniature.
        dtype: Type of the weights, whatever their type in the files is.
        options: Options of the base model; None for the defaults, which take everything from the model's own files.
        unet_as_stored: Whether the UNet keeps its weights in half precision where its file has them so. A weight that
            keeps its type takes no memory beside the file, which is mapped.

    Raises:
        ModelError: The model is a pickle, a part of it is missing, unreadable or does not fit, or a weight is not
            finite; the message names the file.
    """
    options = options or ModelOptions()
    check_model(model, options)
    pipeline: DiffusionPipeline
    source: str | ModelFacts = "scheduler_config.json"
    if is_single_file(model):
        pipeline, source = _load_single_file(Path(model), dtype, options, unet_as_stored)
    elif model == MINIATURE:
        pipeline = load_miniature(dtype=dtype)
    else:
        pipeline = _load_folder(str(model), dtype, options, unet_as_stored)
    prepare_autoencoder(pipeline, options, dtype)
    _refuse_infinite_weights(model, pipeline)
    try:
        return LoadedModel(pipeline, state_facts(pipeline, options, source))
    except ModelError as error:
        raise ModelError(f"{printable(model)}: {error}") from error


def _load_single_file(
    path: Path, dtype: torch.dtype, options: ModelOptions, unet_as_stored: bool
) -> tuple[DiffusionPipeline, ModelFacts]:
    """Load the pipeline of a single file; one without an autoencoder takes the one that the options name."""
    file, vae = read_single_file(path), None
    if not file.has_vae and (source := options.pretrained_vae_model_name_or_path) is not None:
        table = family_table(file.family)
        vae = load_autoencoder(source, dtype, table["vae"])
        check_fits(source, vae, table["unet"]["out_channels"], None)
    with _one_line_errors(path):
        return load_single_file(file, dtype, options, vae, unet_as_stored=unet_as_stored)


def local_source(model: str, options: ModelOptions | None = None) -> str:
    """Return the folder of a hub id on this machine, and any other name of a model as it is.

    The files of a hub id are downloaded where they are missing and the network may be used. `d2f.json` is among them,
    which diffusers leaves out: the folder has the tags of the model.

    Args:
        model: Hub id, pipeline folder, `.safetensors` file, or "miniature".
        options: Options of the base model; None for the defaults.

    Raises:
        ModelError: The hub id names no model, or one that is not on this machine and cannot be downloaded.
    """
    options = options or ModelOptions()
    check_model(model, options)
    if model == MINIATURE or is_single_file(model) or Path(model).is_dir():
        return model
    if HF_HUB_OFFLINE:
        return cached_folder(model, options.revision, options.variant)
    with _one_line_errors(model):
        return _downloaded(model, options.revision, options.variant)


def checked_source(
    model: str, lora: Sequence[str], options: ModelOptions, shift: float | None, *, from_image: bool = False
) -> str:
    """Return what `local_source` does, and refuse the tags of a hub id, which could not be checked before.

    Args:
        model, options: As for `local_source`.
        lora, shift, from_image: As for `check_sampling_tags`.

    Raises:
        RefusedInputError: The hub id names no model that can be had, or its tags cannot be used.
    """
    source = local_source(model, options)
    if source != model:
        check_sampling_tags(source, lora, options, shift, from_image=from_image)
    return source


@cache  # Each answer takes several requests, also for files that are there.
def _downloaded(model: str, revision: str | None, variant: str | None) -> str:
    """Download what is missing of a hub id, and return its folder."""
    folder: str = DiffusionPipeline.download(model, revision=revision, variant=variant, **_LOADING)
    with suppress(RemoteEntryNotFoundError):  # where another program made the model
        hf_hub_download(model, TAGS_FILE, revision=Path(folder).name)  # of the commit that was downloaded
    return folder


def _load_folder(model: str, dtype: torch.dtype, options: ModelOptions, unet_as_stored: bool) -> DiffusionPipeline:
    """Load the pipeline of a folder or a hub id."""
    folder = local_source(model, options)
    if folder == model:
        check_folder(Path(folder), options.variant)
    loading: dict[str, Any] = {**_LOADING, "variant": options.variant}
    with _one_line_errors(model):
        types = {"default": dtype}
        if unet_as_stored:
            types["unet"] = unet_half_type(Path(folder), options.variant) or dtype
        if read_config(Path(folder) / "model_index.json").get("_class_name") == "MarigoldDepthPipeline":
            loading = {name: value for name, value in loading.items() if "safety_checker" not in name}
        return DiffusionPipeline.from_pretrained(folder, dtype=types, **loading)


@contextmanager
def _one_line_errors(model: str | Path) -> Iterator[None]:
    """Turn what diffusers raises for a model that it cannot load into one line that names the model."""
    try:
        yield
    except ModelError:
        raise
    except SingleFileComponentError as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{model}: {reason} Give a file with every part, or a pipeline folder") from error
    except (AttributeError, NotImplementedError, OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{model} cannot be loaded: {' '.join(str(error).split())}") from error


def _refuse_infinite_weights(model: str | Path, pipeline: DiffusionPipeline) -> None:
    """Refuse a pipeline with a weight that is NaN or infinite, which would make every result so."""
    for name, part in pipeline.components.items():
        for key, parameter in part.named_parameters() if isinstance(part, torch.nn.Module) else ():
            # The sum takes no memory of its own, and is only infinite by itself for weights that no network has.
            if not parameter.detach().sum(dtype=torch.float32).isfinite() and not parameter.isfinite().all():
                raise ModelError(
                    f"{printable(model)}: {key} of the {name} holds NaN or infinity: restore it from an intact copy"
                )

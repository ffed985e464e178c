"""Load a diffusers pipeline from a hub id, a folder or a single safetensors file. No pickle is ever read."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError, safe_open

from d2f_fast.errors import ModelError
from d2f_fast.miniature import load_miniature
from d2f_fast.models.facts import ModelFacts, state_facts
from d2f_fast.models.names import MINIATURE
from d2f_fast.models.options import ModelOptions
from d2f_fast.models.single_file import load_single_file, read_single_file

PICKLE_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}


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
    model: str | Path, dtype: torch.dtype = torch.float32, options: ModelOptions | None = None
) -> LoadedModel:
    """Load the diffusers pipeline of a model, without its safety checker, and say what the model is taken for.

    Args:
        model: Hub id, pipeline folder, `.safetensors` file with every part, or "miniature" for the embedded miniature.
        dtype: Type of the weights.
        options: Options of the base model; None for the defaults, which take everything from the model's own files.

    Raises:
        ModelError: The model is a pickle, or a part of it is missing or unreadable; the message names the file.
    """
    options = options or ModelOptions()
    path = Path(model)
    if path.suffix in PICKLE_SUFFIXES and model != MINIATURE:
        raise ModelError(f"{path} is a pickle, which can run code: convert it to safetensors first")
    if path.suffix == ".safetensors" and not path.is_dir():
        file = read_single_file(path)
        with _one_line_errors(model):
            pipeline, facts = load_single_file(file, dtype, options)
        return LoadedModel(pipeline, state_facts(pipeline, options, facts))
    pipeline = _load_pipeline(model, dtype)
    return LoadedModel(pipeline, state_facts(pipeline, options, "scheduler_config.json"))


def _load_pipeline(model: str | Path, dtype: torch.dtype) -> DiffusionPipeline:
    """Load the pipeline of a folder, a hub id or the miniature."""
    if model == MINIATURE:
        return load_miniature(dtype=dtype)
    path = Path(model)
    if path.is_dir():
        _check_folder(path)
    elif path.is_absolute() or str(model).startswith("."):
        raise ModelError(f"{path} does not exist: give a hub id, a pipeline folder or a .safetensors file")
    with _one_line_errors(model):
        options = {"dtype": dtype, "use_safetensors": True, "safety_checker": None, "requires_safety_checker": False}
        return DiffusionPipeline.from_pretrained(str(model), **options)


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


def _check_folder(folder: Path) -> None:
    """Refuse a folder that is not a complete pipeline, and name the missing part."""
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ModelError(f"{folder} has no model_index.json: give the folder of a diffusers pipeline")
    try:
        index = dict(json.loads(index_file.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{index_file} is not a JSON object: restore it from the base model") from error
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise ModelError(
            f"{folder / 'scheduler' / 'scheduler_config.json'} is missing: it holds the prediction type and the"
            " schedule; copy it from the base model"
        )
    for name in sorted(index.keys() & {"tokenizer", "tokenizer_2"}):
        # Without files, transformers makes an empty tokenizer that knows no word.
        if index[name] != [None, None] and not any((folder / name).glob("*.json")):
            raise ModelError(f"{folder / name} holds no tokenizer: copy it from the base model")
    for path in sorted(folder.glob("*/*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ModelError(
                f"{path} is not an intact safetensors file ({error}): restore it from the base model"
            ) from error
    for name in ("unet", "vae"):
        if not any((folder / name).glob("*.safetensors")):
            pickles = any(path.suffix in PICKLE_SUFFIXES for path in (folder / name).glob("*"))
            found = "holds a pickle, which can run code" if pickles else "holds no weights"
            raise ModelError(f"{folder / name} {found}: give the model as safetensors")

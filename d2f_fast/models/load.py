"""Load a diffusers pipeline from a hub id, a folder or a single safetensors file; nothing unpickles."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError, safe_open

from d2f_fast.errors import ModelError

PICKLE_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}


def load_pipeline(model: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The diffusers pipeline of a hub id, a pipeline folder or a single `.safetensors` file, without safety checker.

    Raises:
        ModelError: a pickle, or a missing or unreadable part; the message names the file.
    """
    path = Path(model)
    if path.suffix in PICKLE_SUFFIXES:
        raise ModelError(f"{path} is a pickle, which can run code: convert it to safetensors first")
    if path.is_dir():
        _check_folder(path)
    elif path.suffix != ".safetensors" and (path.is_absolute() or str(model).startswith(".")):
        raise ModelError(f"{path} does not exist: give a hub id, a pipeline folder or a .safetensors file")
    try:
        if path.suffix == ".safetensors":
            return _single_file_class(path).from_single_file(str(path), dtype=dtype)
        options = {"dtype": dtype, "use_safetensors": True, "safety_checker": None, "requires_safety_checker": False}
        return DiffusionPipeline.from_pretrained(str(model), **options)
    except SingleFileComponentError as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{model}: {reason} Give a file with every part, or a pipeline folder") from error
    except (AttributeError, NotImplementedError, OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{model} cannot be loaded: {' '.join(str(error).split())}") from error


def _check_folder(folder: Path) -> None:
    """Refuse a folder that is no pipeline, in words that name what is missing."""
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ModelError(f"{folder} has no model_index.json: give the folder of a diffusers pipeline")
    try:
        index = dict(json.loads(index_file.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{index_file} is no JSON object: restore it from the base model") from error
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        raise ModelError(
            f"{folder / 'scheduler' / 'scheduler_config.json'} is missing: it tells the prediction type and the"
            " schedule; copy it from the base model"
        )
    for name in sorted(index.keys() & {"tokenizer", "tokenizer_2"}):
        # transformers makes an empty tokenizer, to which every word is unknown, where there are no files.
        if index[name] != [None, None] and not any((folder / name).glob("*.json")):
            raise ModelError(f"{folder / name} holds no tokenizer: copy it from the base model")
    for path in sorted(folder.glob("*/*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ModelError(f"{path} is no intact safetensors ({error}): restore it from the base model") from error
    for name in ("unet", "vae"):
        if not any((folder / name).glob("*.safetensors")):
            pickles = any(path.suffix in PICKLE_SUFFIXES for path in (folder / name).glob("*"))
            found = "holds a pickle, which can run code" if pickles else "holds no weights"
            raise ModelError(f"{folder / name} {found}: give the model as safetensors")


def _single_file_class(path: Path) -> Any:
    """Pipeline class of a single-file checkpoint, from its keys."""
    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
    is_sdxl = any(key.startswith("conditioner.embedders.1") for key in keys)
    return StableDiffusionXLPipeline if is_sdxl else StableDiffusionPipeline

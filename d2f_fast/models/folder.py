"""Check the folder of a diffusers pipeline before anything in it is loaded, and find one in the hub's cache."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2f_fast.errors import CheckpointError, ModelError, printable
from d2f_fast.files.json_file import read_json
from d2f_fast.files.tensor_header import TensorInfo, read_tensor_header
from d2f_fast.lora.source import lora_path
from d2f_fast.models.names import PICKLE_SUFFIXES

if TYPE_CHECKING:
    import torch

_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?(?:\.(?P<late>[\w-]+))?\.safetensors"
)
_WHOLE_NUMBERS = ("position_ids", "num_batches_tracked")
_RESTORE = "restore it from the base model"


def check_folder(folder: Path, variant: str | None = None) -> None:
    """Refuse a folder that is not a complete pipeline of intact safetensors files, and name the missing part.

    Args:
        folder: Folder of a diffusers pipeline.
        variant: Variant of the weight files, such as "fp16"; None for the files without one.

    Raises:
        ModelError: A file is missing, damaged or a pickle.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        if (folder / "pipeline" / "model_index.json").is_file():
            raise ModelError(f"{folder} is the folder of a run: give {folder / 'pipeline'}, the model that it trained")
        if lora_path(folder).is_file():
            raise ModelError(
                f"{folder} holds a LoRA, not a model: give the model that it belongs to, and {folder} as the LoRA"
            )
        raise ModelError(f"{folder} has no model_index.json: give the folder of a diffusers pipeline")
    try:
        index = dict(json.loads(index_file.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{index_file} is not a JSON object: {_RESTORE}") from error
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
            check_real_weights(path, read_tensor_header(path).tensors)
        except CheckpointError as error:
            raise ModelError(str(error)) from error
    for path in sorted(folder.glob("*/*.safetensors.index*.json")):
        _check_shards(path)
    encoders = [name for name in ("text_encoder", "text_encoder_2") if index.get(name, [None, None]) != [None, None]]
    for name in ("unet", "vae", *encoders):
        _check_weights(folder / name, variant)


def check_real_weights(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse a file of which a weight is stored as whole or complex numbers.

    Args:
        path: File, for the message.
        tensors: Its weights, by key.

    Raises:
        ModelError: A weight is of such a type. Positions and counters, which are not weights, may be whole numbers.
    """
    for key, info in tensors.items():
        if "F" not in info.dtype and not key.endswith(_WHOLE_NUMBERS):
            raise ModelError(
                f"{printable(path)}: {printable(key)} is of type {info.dtype}, which holds no weights: give a model in"
                " float32, float16 or bfloat16"
            )


def unet_half_type(folder: Path, variant: str | None) -> "torch.dtype | None":
    """Return the half-precision type of all weights of a folder's UNet, or None if they are of another type or of two.

    Args:
        folder: Folder of a diffusers pipeline.
        variant: Variant of the weight files; None for the files without one.

    Raises:
        CheckpointError: A file is damaged.
    """
    files = weight_files(folder / "unet", variant)
    return half_type(info for path in files for info in read_tensor_header(path).tensors.values())


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the safetensors files of a component, those of one variant.

    Args:
        folder: Folder of the component.
        variant: Variant of the weight files; None for the files without one.
    """
    found = [(path, match) for path in sorted(folder.glob("*.safetensors")) if (match := _WEIGHTS.fullmatch(path.name))]
    return [path for path, match in found if (match["variant"] or match["late"]) == variant]


def half_type(tensors: Iterable[TensorInfo]) -> "torch.dtype | None":
    """Return the half-precision type of all tensors, or None if they are of another type or of two.

    Args:
        tensors: Tensors as the headers of their files describe them.
    """
    import torch  # The checks of a folder do without.

    types = {info.dtype for info in tensors}
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(types.pop()) if len(types) == 1 else None


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration of a part of a model.

    Args:
        path: JSON file of a pipeline folder.

    Raises:
        CheckpointError: The file is missing or not JSON.
        ModelError: The file is not a JSON object.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise ModelError(f"{printable(path)} is not a JSON object: restore it from the base model")
    return config


def cached_folder(model: str, revision: str | None, variant: str | None) -> str:
    """Return the folder of a model in the hub's cache, for a machine that may not use the network.

    Args:
        model: Hub id.
        revision: Branch, tag or commit; None for the main branch.
        variant: Variant of the weight files; None for the files without one.

    Raises:
        ModelError: The model is not in the cache, or a file of it is missing there.
    """
    from huggingface_hub import constants, snapshot_download

    options = "".join(f" --revision {revision}" if revision is not None else "")
    cure = f"run `hf download {printable(model)}{options}` with a network first, or give a folder"
    try:
        folder = snapshot_download(model, revision=revision, local_files_only=True)
    except (OSError, ValueError) as error:  # ValueError stands for a name that no repository can have.
        raise ModelError(
            f"{printable(model)} is neither a folder nor in the hub's cache {constants.HF_HUB_CACHE}, and"
            f" HF_HUB_OFFLINE forbids to download it: {cure}"
        ) from error
    try:
        check_folder(Path(folder), variant)
    except ModelError as error:
        raise ModelError(f"{printable(model)} is not complete in the hub's cache: {error}; {cure}") from error
    return folder


def _check_shards(path: Path) -> None:
    """Refuse the index of a divided file that names a pickle, a file elsewhere, or one that is missing."""
    try:
        content: Any = read_json(path)
        names: Iterable[Any] = sorted(set(content["weight_map"].values()))
    except (CheckpointError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} is not the index of a divided safetensors file: {_RESTORE}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{path} names {printable(str(name)[:200])}, which is not a safetensors file beside it, and could be a"
                f" pickle that runs code: {_RESTORE}"
            )
        if not (path.parent / name).is_file():
            raise ModelError(f"{path.parent / name} is missing, which {path.name} names: {_RESTORE}")


def _check_weights(folder: Path, variant: str | None) -> None:
    """Refuse the folder of a component without weights of the variant."""
    found = [match for path in folder.glob("*.safetensors") if (match := _WEIGHTS.fullmatch(path.name))]
    variants = {match["variant"] or match["late"] for match in found}
    if variant in variants:
        return
    if None in variants:
        raise ModelError(f"{folder} holds no weights of the variant {printable(variant)}: leave --variant out")
    if variants:
        named = " and ".join(sorted(str(name) for name in variants))
        first = min(str(name) for name in variants)
        raise ModelError(f"{folder} holds weights of the variant {printable(named)} alone: add --variant {first}")
    pickles = any(path.suffix in PICKLE_SUFFIXES for path in folder.glob("*"))
    held = "holds a pickle, which can run code" if pickles else "holds no weights"
    raise ModelError(f"{folder} {held}: give the model as safetensors")

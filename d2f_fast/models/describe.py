"""Describe a model from its configuration and the headers of its files alone. No tensor is read."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from d2f_fast.errors import CheckpointError, ModelError, printable
from d2f_fast.files.tensor_header import TensorInfo, read_tensor_header
from d2f_fast.files.walk import bytes_below
from d2f_fast.lora.family import family_name
from d2f_fast.models.folder import read_config
from d2f_fast.models.names import ORIGINAL_PREFIXES, PICKLE_SUFFIXES
from d2f_fast.models.tags import TAGS_FILE, saved_tags

_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
# Numbers of the training code and markers, which original files hold beside the weights.
_OTHER_KEYS = re.compile(
    r"(model_ema\.|alphas_cumprod|betas|sqrt_|log_one_minus|posterior_|denoiser\.|global_step|epoch|edm_|lvlb_|logvar"
    r"|scale_factor|v_pred$|ztsnr$|model\.alphas)"
)
_FILE_PARTS = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text encoder 2": ("conditioner.embedders.1.",),
}


def describe_model_folder(folder: Path) -> dict[str, Any]:
    """Return what a diffusers folder holds, what it needs, and what is odd about it.

    Args:
        folder: Folder with a `model_index.json`.

    Raises:
        CheckpointError: A configuration is missing or not JSON, or a file is damaged.
        ModelError: A configuration is not a JSON object.
    """
    index, unet = read_config(folder / "model_index.json"), read_config(folder / "unet" / "config.json")
    scheduler_file = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_config(scheduler_file)
    parts = {name: folder / name for name in _PARTS if (index.get(name) or [None])[0] is not None}
    tensors = {name: _component(path) for name, path in parts.items()}
    return {
        "kind": f"diffusers folder ({index.get('_class_name', 'no class')})",
        "family": family_name(unet),
        "prediction type": _stated(scheduler, "prediction_type", "epsilon"),
        "zero terminal SNR": _stated(scheduler, "rescale_betas_zero_snr", False),
        "scheduler": scheduler.get("_class_name", "not named"),
        "size of its images": _image_size(unet, folder),
        "parameters": {name: sum(info.elements for info in found.values()) for name, found in tensors.items()},
        "types": {name: _types(found.values()) for name, found in tensors.items()},
        "bytes": bytes_below(folder),
        "entries": _entries(folder),
        "needs": ["diffusers, or `d2f convert` for a single file that ComfyUI, A1111 and Forge read"],
        "odd": [*_folder_oddities(folder, index, unet), *_weight_oddities(parts, tensors)],
    }


def describe_model_file(path: Path) -> dict[str, Any]:
    """Return what a single file in the original layout holds, what it needs, and what is odd about it.

    Args:
        path: `.safetensors` file.

    Raises:
        CheckpointError: The file is damaged, or a pickle.
    """
    header = read_tensor_header(path)
    parts = {
        name: [info for key, info in header.tensors.items() if key.startswith(prefixes)]
        for name, prefixes in _FILE_PARTS.items()
    }
    foreign = [key for key in header.tensors if not key.startswith(ORIGINAL_PREFIXES) and not _OTHER_KEYS.match(key)]
    average = sum(key.startswith("model_ema.diffusion_model") for key in header.tensors)
    odd = []
    if foreign:
        odd.append(f"{len(foreign)} of {len(header.tensors)} keys are foreign, such as {printable(foreign[0])}")
    if average:
        odd.append(
            "it holds a moving average of the weights (model_ema) beside them, which no program that samples reads"
        )
    start = "cond_stage_model.transformer."
    if any(key.startswith(start) and not key.startswith(f"{start}text_model.") for key in header.tensors):
        odd.append("the keys of its text encoder lack text_model.: some programs then use a random one")
    odd += _whole_numbers({key: info for key, info in header.tensors.items() if key.startswith(ORIGINAL_PREFIXES)})
    facts, problem = _facts(path)
    return {
        "kind": "single file in the original layout",
        **facts,
        "parameters": {name: sum(info.elements for info in infos) for name, infos in parts.items() if infos},
        "types": {name: _types(infos) for name, infos in parts.items() if infos},
        "bytes": path.stat().st_size,
        "entries": {k: v for k, v in header.entries.items() if k.startswith(("modelspec.", "d2f."))},
        "needs": ["ComfyUI, A1111 or Forge, or `d2f convert` for a diffusers folder"],
        "odd": odd + ([problem] if problem else []),
    }


def _facts(path: Path) -> tuple[dict[str, str], str | None]:
    """Return what a single file is taken for, and why it cannot be loaded where that is so."""
    # These modules import diffusers, which takes seconds; the rest of a description does without.
    from d2f_fast.models.options import ModelOptions
    from d2f_fast.models.single_file import read_facts
    from d2f_fast.models.single_file_header import read_single_file

    try:
        found = read_facts(read_single_file(path), ModelOptions())
    except ModelError as error:
        return {}, f"it cannot be loaded: {error}"
    return {
        "family": found.family,
        "prediction type": f"{found.prediction_type} ({found.prediction_source})",
        "zero terminal SNR": f"{_yes_or_no(found.zero_snr)} ({found.zero_snr_source})",
    }, None


def _image_size(unet: Mapping[str, Any], folder: Path) -> str:
    """Return the size of the images that a model was trained on, or else made for."""
    if (trained := _entries(folder).get("d2f.resolution")) is not None:
        return f"{printable(trained)} pixels ({TAGS_FILE})"
    side, levels = unet.get("sample_size"), _autoencoder(folder).get("block_out_channels", ())
    return f"{side << (len(levels) - 1)} pixels" if isinstance(side, int) and levels else "not stated"


def _autoencoder(folder: Path) -> dict[str, Any]:
    """Return the configuration of the autoencoder, empty where there is none."""
    path = folder / "vae" / "config.json"
    return read_config(path) if path.is_file() else {}


def _stated(scheduler: Mapping[str, Any], name: str, default: object) -> str:
    """Return an entry of the scheduler's configuration, and where it was read."""
    value = scheduler.get(name, default)
    source = "scheduler_config.json" if name in scheduler else f"default of {scheduler.get('_class_name', 'diffusers')}"
    return f"{_yes_or_no(value) if isinstance(value, bool) else value} ({source})"


def _yes_or_no(value: bool) -> str:
    """Return a truth value as a word."""
    return "yes" if value else "no"


def _component(folder: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a component, those of one variant."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [path for path in files if not re.search(r"\.(fp16|bf16|non_ema|ema)[.-]", path.name)]
    return {key: info for path in plain or files for key, info in read_tensor_header(path).tensors.items()}


def _types(infos: Iterable[TensorInfo]) -> str:
    """Return the floating-point types of tensors, with the number of elements in each where there are several."""
    counted: Counter[str] = Counter()
    for info in infos:
        if "F" in info.dtype:
            counted[info.dtype] += info.elements
    return ", ".join(counted) if len(counted) < 2 else ", ".join(f"{name} ({n}×)" for name, n in counted.most_common())


def _whole_numbers(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return a sentence on weights that are stored as whole numbers, or nothing where there are none."""
    found = [key for key, info in tensors.items() if "F" not in info.dtype and not key.endswith("position_ids")]
    if not found:
        return []
    kind = tensors[found[0]].dtype
    return [f"{len(found)} weights are of type {kind}, which no loader reads, such as {printable(found[0])}"]


def _entries(folder: Path) -> dict[str, str]:
    """Return how the model was trained and is to be sampled, where this package wrote it."""
    try:
        return saved_tags(str(folder))
    except (CheckpointError, ModelError):
        return {}


def _folder_oddities(folder: Path, index: Mapping[str, Any], unet: Mapping[str, Any]) -> list[str]:
    """Return what other programs trip over in the files beside the weights."""
    odd = []
    for name in ("tokenizer", "tokenizer_2"):
        if (index.get(name) or [None])[0] is not None:
            missing = [file for file in ("vocab.json", "merges.txt") if not (folder / name / file).is_file()]
            if missing:
                odd.append(f"{name}/ lacks {' and '.join(missing)}, which transformers before 5 needs")
    channels = unet.get("in_channels", 4)
    if channels != 4:
        odd.append(f"the UNet takes {channels} channels: it is an inpainting, depth or other image-conditioned model")
    kind = _autoencoder(folder).get("_class_name", "AutoencoderKL")
    return odd + ([] if kind == "AutoencoderKL" else [f"its autoencoder is of the class {kind}"])


def _weight_oddities(parts: Mapping[str, Path], tensors: Mapping[str, Mapping[str, TensorInfo]]) -> list[str]:
    """Return what other programs trip over in the weights."""
    odd = []
    for name, folder in parts.items():
        pickles = [path.name for path in folder.glob("*") if path.suffix in PICKLE_SUFFIXES]
        if not tensors[name]:
            odd.append(f"{name}/ holds {f'only a pickle ({pickles[0]})' if pickles else 'no weights'}")
        elif pickles:
            odd.append(f"{name}/ holds a pickle, {pickles[0]}, beside the safetensors file: it is not read")
        odd += _whole_numbers(tensors[name])
        keep = ("text_model.", "text_projection.")
        if name.startswith("text_encoder") and any(not key.startswith(keep) for key in tensors[name]):
            odd.append(
                f"the keys of {name}/ lack text_model.: transformers before 5, ComfyUI and kohya's scripts then use a"
                " random text encoder; `d2f convert` to a new folder adds it"
            )
    return odd

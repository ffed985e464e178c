"""Files of `d2f sample` beside its images: images that are inverted, noise, and states on the way."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from d2f_fast import __version__
from d2f_fast.config import SamplingMethod, StochasticMethod
from d2f_fast.data.image_folder import find_image_files
from d2f_fast.errors import CheckpointError, RefusedInputError, printable
from d2f_fast.lora.source import parse_lora

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

_KEY = "noise"


def check_start(
    invert: Sequence[str] | None, noise: Sequence[str] | None, prompts: int, method: SamplingMethod
) -> None:
    """Refuse images and noise that are not there, or not one for each prompt, and what cannot be inverted.

    Args:
        invert: Images that are inverted; None for none.
        noise: Files of noise; None for none.
        prompts: Number of prompts.
        method: Integration method.

    Raises:
        RefusedInputError: A file is missing, the numbers differ, both are given, or the method adds noise.
    """
    if invert is not None and noise is not None:
        raise RefusedInputError("give either --invert or --noise: an inverted image starts from its own noise")
    if invert is not None and method in get_args(StochasticMethod):
        raise RefusedInputError(f"invert has no use for the method {method}, which adds noise: give --method rk4")
    for name, files in (("invert", invert), ("noise", noise)):
        if files is None:
            continue
        if len(files) != prompts:
            raise RefusedInputError(f"{name}: give one file for each of the {prompts} prompts, got {len(files)}")
        for file in files:
            if not Path(file).is_file():
                raise RefusedInputError(f"{name}: {printable(file)} is not a file: check the path")


def find_images(entries: Sequence[str]) -> list[Path]:
    """Return the image files among files and folders of images, those of folders in the order of their names.

    Args:
        entries: Files and folders, as they were given with --image.

    Raises:
        RefusedInputError: There is none, one does not exist, or two have the same name.
    """
    if not entries:
        raise RefusedInputError("image: give at least one image file, or a folder of images")
    found: dict[str, Path] = {}
    for entry in map(Path, entries):
        if not entry.exists():
            raise RefusedInputError(f"image: {printable(entry)} does not exist: give an image file or a folder")
        for path in find_image_files(entry) if entry.is_dir() else [entry]:
            if (other := found.setdefault(path.stem, path)) is not path:
                raise RefusedInputError(
                    f"image: {printable(path)} and {printable(other)} would have one name in output_dir: rename one"
                )
    return list(found.values())


def read_images(files: Sequence[str]) -> "list[Image.Image]":
    """Return images as upright RGB.

    Raises:
        DatasetError: A file does not decode.
    """
    from d2f_fast.data.images import read_image, to_rgb

    return [to_rgb(read_image(Path(file))) for file in files]


def read_noise(files: Sequence[str]) -> "Tensor":
    """Return the noise of several files, [B, C, h, w] float32.

    Raises:
        CheckpointError: A file is damaged or holds no noise, or their shapes differ.
    """
    import torch

    from d2f_fast.files.tensor_file import read_tensors

    found = []
    for file in files:
        tensors, _ = read_tensors(file)
        if _KEY not in tensors or tensors[_KEY].ndim != 3 or not tensors[_KEY].is_floating_point():
            raise CheckpointError(f"{printable(file)} holds no noise: give a file that d2f sample --invert wrote")
        found.append(tensors[_KEY].float())
        if found[-1].shape != found[0].shape:
            raise CheckpointError(
                f"{printable(file)} has noise of {list(found[-1].shape)}, and {printable(files[0])} of"
                f" {list(found[0].shape)}: generate images of one size at a time"
            )
    return torch.stack(found)


def write_noise(folder: Path, first: int, noise: "Tensor") -> None:
    """Write the noise of each image as `000_noise.safetensors`.

    Args:
        folder: Output folder, which exists.
        first: Number of the first image.
        noise: Noise, [B, C, h, w].

    Raises:
        CheckpointError: The noise is not finite.
        RefusedInputError: The disk is full.
    """
    from d2f_fast.files.tensor_file import write_tensors

    for position, each in enumerate(noise):
        write_tensors(folder / f"{first + position:03d}_noise.safetensors", {_KEY: each.contiguous()})


def write_states(folder: Path, first: int, number: int, t: float, images: "Sequence[Image.Image]") -> None:
    """Write the images of one state on the way as `000_00.png` and so on.

    Args:
        folder: Output folder, which exists.
        first: Number of the first image.
        number: Number of the state, 0 for the start.
        t: Flow time of the state, which is written into the files.
        images: Image of each state.

    Raises:
        RefusedInputError: The disk is full.
    """
    from PIL.PngImagePlugin import PngInfo

    from d2f_fast.files.atomic import atomic_path

    text = PngInfo()
    text.add_text("flow_time", f"{t:.6g}")
    for position, image in enumerate(images):
        with atomic_path(folder / f"{first + position:03d}_{number:02d}.png") as temporary:
            image.save(temporary, pnginfo=text)


def png_entries(row: Mapping[str, Any], position: int) -> dict[str, object]:
    """Return how one image was generated, under the names that A1111 gives them.

    Args:
        row: How the images were generated, as metrics.json records it.
        position: Number of the image among them, from 0.
    """
    loras = [f"{_file_name(path)}:{scale:g}" for path, scale in map(parse_lora, row.get("lora", []))]
    model = Path(row.get("onnx") or row["model"])
    several = row["samples"] > 1
    found = {
        "Steps": row["steps"],
        "Sampler": f"d2f flow {row.get('method', 'graph')}",
        "Schedule type": row.get("flow_spacing"),
        "Shift": row.get("shift"),
        "CFG scale": row["guidance_scale"],
        "Image CFG scale": row.get("image_guidance_scale"),
        "Seed": row["seed"],
        "Size": f"{row['width']}x{row['height']}",
        "Model": _file_name(model) if model.exists() else str(model),
        "Lora": ", ".join(loras) or None,
        "Batch size": row["samples"] if several else None,
        "Batch pos": position if several else None,
        "Version": f"d2f_fast {__version__}",
    }
    return {name: value for name, value in found.items() if value is not None}


def _file_name(path: Path) -> str:
    """Return the name of a model or a LoRA, which images may carry to others; a path may not."""
    return path.resolve().name.removesuffix(".safetensors")

"""How a model is named, and names that can be refused before anything is loaded. Imports no library."""

from pathlib import Path

from d2f_fast.errors import ModelError, printable

# `load_pipeline` loads the embedded miniature by this name; a folder of the same name is "./miniature".
MINIATURE = "miniature"
PICKLE_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
# Beginnings of the keys in a single file with a whole model, or with its UNet alone.
ORIGINAL_PREFIXES = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")


def check_model_name(model: str | Path, variant: str | None = None, revision: str | None = None) -> None:
    """Refuse a name by which no model can be loaded, without reading any file.

    Args:
        model: Hub id, pipeline folder, `.safetensors` file, or "miniature".
        variant: Variant of the weight files; None for the files without one.
        revision: Revision of a hub id; None for the newest.

    Raises:
        ModelError: The model is a pickle, the path does not exist, or the model has no variants or revisions.
    """
    path, where = Path(model), printable(model)
    is_file = is_single_file(model)
    refuse_pickle(path)
    if ".safetensors:" in str(model) and not path.exists():
        raise ModelError(f"{where}: no such file; a strength after the colon is only for a LoRA, and must be a number")
    is_path = path.is_absolute() or str(model).startswith(".")
    if is_file and not path.is_file():
        raise ModelError(f"{where}: no such file; check the path")
    if is_path and not is_file and not path.is_dir():
        raise ModelError(f"{where} does not exist: give a hub id, a pipeline folder or a .safetensors file")
    if variant is not None and (is_file or model == MINIATURE):
        raise ModelError(f"variant is {printable(variant)}, and {where} has no variants: leave variant out")
    if revision is not None and (is_file or model == MINIATURE or path.is_dir()):
        raise ModelError(f"revision is {printable(revision)}, and {where} is not a hub id: leave revision out")


def refuse_pickle(path: Path) -> None:
    """Refuse a file whose name is that of a pickle, and say how to convert it.

    Args:
        path: File that is named as a model or a LoRA; it need not exist.

    Raises:
        ModelError: The name ends as that of a pickle, and no folder has it.
    """
    if path.suffix in PICKLE_SUFFIXES and not path.is_dir():
        raise ModelError(
            f"{printable(path)} is a pickle, which can run code: convert it to safetensors first, where you trust it,"
            f" for example with diffusers' python scripts/convert_original_stable_diffusion_to_diffusers.py"
            f" --checkpoint_path {printable(path)} --dump_path {printable(path.with_suffix(''))} --to_safetensors"
        )


def check_autoencoder_name(source: str) -> None:
    """Refuse a name by which no autoencoder can be loaded, without reading any file.

    Args:
        source: Hub id, folder, or `.safetensors` file.

    Raises:
        ModelError: The autoencoder is a pickle, or the path does not exist.
    """
    path, where = Path(source), f"autoencoder {printable(source)}"
    refuse_pickle(path)
    is_path = path.is_absolute() or source.startswith(".")
    if is_single_file(source) and not path.is_file():
        raise ModelError(f"{where}: no such file; check the path")
    if is_path and not path.exists():
        raise ModelError(f"{where} does not exist: give a hub id, a folder or a .safetensors file")


def is_single_file(model: str | Path) -> bool:
    """Return whether a model is named as a single file, whether or not the file exists.

    Args:
        model: Hub id, pipeline folder, `.safetensors` file, or "miniature".
    """
    path = Path(model)
    return path.suffix == ".safetensors" and not path.is_dir()

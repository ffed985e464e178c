"""Define `export.json`, the report of an export: how it was made, its checks, and the hash of each of its files."""

import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

from d2f_fast.errors import RefusedInputError
from d2f_fast.export.options import COMPONENTS, MODEL_OPTIONS, ExportOptions
from d2f_fast.export.readiness import Readiness
from d2f_fast.export.verify import Row
from d2f_fast.files.hashes import file_sha256
from d2f_fast.lora.merge import MergedLora

REPORT = "export.json"
_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime-gpu", "onnxruntime")


class FileEntry(TypedDict):
    """Size and SHA-256 of a file of the export."""

    bytes: int
    sha256: str


class Report(TypedDict):
    """Content of `export.json`.

    model, vae: last part of the path or hub id; vae is None for the model's own autoencoder.
    taken_for: what the model is taken for, and where that was read.
    adapters: file, scale, number of layers and relative weight change of each merged LoRA.
    precision: number format of each component's weights.
    shift: factor on (1 - t) / t at each step of the sampler.
    recommended_guidance: guidance scale that the model's and the LoRA's files recommend; None for no recommendation.
    recommended_steps: number of sampling steps that these files recommend and the export has a table for, else None.
    start: "zeros" where the model was trained to jump from zeros in one step; None elsewhere.
    parity: a row for each comparison with torch.
    tensorrt: result of the static TensorRT check of each graph, by path.
    trtexec: command that builds an engine of each graph.
    versions: version of each library that took part.
    files: every other file of the export, by path.
    model_options: options of the base model that were given, without paths.
    The rest are the options of the same names; `verified` says whether the graphs were run.
    """

    format: int
    model: str
    vae: str | None
    adapters: list[MergedLora]
    opset: int
    target: str
    precision: dict[str, str]
    prediction_type: str
    shift: float
    taken_for: str
    model_options: dict[str, Any]
    guidance: bool
    image_guidance: bool
    recommended_guidance: float | None
    recommended_steps: int | None
    start: str | None
    with_vae: bool
    unroll: int
    static: str | None
    verified: bool
    tolerance: float
    parity: list[Row]
    tensorrt: dict[str, Readiness]
    trtexec: list[str]
    versions: dict[str, str]
    files: dict[str, FileEntry]


def package_versions() -> dict[str, str]:
    """Return the versions of the installed libraries that take part in an export."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def list_files(folder: Path) -> dict[str, FileEntry]:
    """Return the size and hash of each file of a folder, by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_report(folder: Path) -> Report:
    """Read the report of an earlier export, whose files `check_manifest` has compared with it.

    Args:
        folder: export folder.
    """
    report: Report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return report


def check_manifest(folder: Path) -> None:
    """Refuse a folder whose files are not those that its report lists.

    Args:
        folder: export folder.

    Raises:
        RefusedInputError: the report is missing or damaged, or a file is missing or changed.
    """
    if not (folder / REPORT).is_file():
        raise RefusedInputError(f"{folder} is not an export ({REPORT} is missing): name the folder of an export")
    try:
        files = dict(read_report(folder)["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedInputError(f"{folder / REPORT} is not the report of an export: export again") from error
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"] or file_sha256(path) != entry["sha256"]:
            raise RefusedInputError(f"{path} is missing or differs from what was exported: export again")


def options_of_export(options: ExportOptions, output: Path) -> ExportOptions:
    """Return the options with which an earlier export was made, as far as its report holds them.

    Args:
        options: options of this run; its model, LoRAs, autoencoder and tolerance are kept.
        output: folder of the earlier export.

    Raises:
        RefusedInputError: the report is damaged, or it names a LoRA or an autoencoder that `options` does not.
    """
    try:
        made = read_report(output)
        lora = " ".join(f"--lora {entry['file']}:{entry['scale']:g}" for entry in made["adapters"])
        needed = [(lora, options.lora), (f"--vae {made['vae']}" if made["vae"] else "", options.vae)]
        names = [name for name in COMPONENTS if name in made["precision"]]
        names += ["sampler"] if "unet/sampler.onnx" in made["files"] else []
        # In an export of half precision the autoencoder alone may be float32, so another component is read first.
        precision = min(made["precision"].items(), key=lambda entry: entry[0].startswith("vae"))[1]
        tables = output / "unet/steps.json"
        stated = dict(made.get("model_options", {}))  # Exports of earlier versions have no such entry.
        counts = json.loads(tables.read_text(encoding="utf-8")) if "unet" in names else options.step_counts
        found = replace(
            options,
            components=",".join(names),
            precision=precision,  # type: ignore[arg-type]  # `check` below refuses other words
            steps=",".join(map(str, counts)),
            shift=float(made["shift"]),
            guidance=made["guidance"],
            image_guidance=made.get("image_guidance", False),  # Exports of earlier versions have no such entry.
            with_vae=made["with_vae"],
            static=made["static"],
            unroll=made["unroll"],
            tolerance=made["tolerance"] if options.tolerance is None else options.tolerance,
            **{name: stated[name] for name in MODEL_OPTIONS if name in stated and getattr(options, name) is None},
        )
        found.check()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, RefusedInputError):
            raise
        raise RefusedInputError(f"{output / REPORT} is not the report of an export: export again") from error
    for option, given in needed:
        if option and not given:
            raise RefusedInputError(f"{output} was exported with {option}: give it again to verify the export")
    return found

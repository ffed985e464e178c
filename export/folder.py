"""Make the export folder: load, merge, trace, wrap, check, and only then rename it into place."""

import gc
import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoModel, DDIMScheduler, EulerDiscreteScheduler
from safetensors import SafetensorError
from torch import Tensor

from d2f_fast.errors import ModelError, RefusedInputError
from d2f_fast.export import graphs, readiness, verify
from d2f_fast.export.inference import latent_sides
from d2f_fast.export.options import COMPONENTS, ExportOptions
from d2f_fast.export.sampler_graph import step_table, write_sampler, write_tables
from d2f_fast.export.staging import (
    REPORT,
    check_manifest,
    check_memory_to_load,
    check_output,
    check_place,
    check_resources,
    into_place,
    recover,
    sha256_of,
    temporary_folder,
)
from d2f_fast.export.wrappers import Component, text_encoder_component, unet_component, vae_components
from d2f_fast.lora.merge import fuse_adapter
from d2f_fast.models.base_model import BaseModel

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime-gpu", "onnxruntime")
# The folder's scheduler takes its steps at the trained times, down to no noise, whatever the model's own was set to.
_STOCK_STEPS = {
    "timestep_spacing": "trailing",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "interpolation_type": "linear",
    "final_sigmas_type": "zero",
}
_NOT_EXPORTED = ("safety_checker", "feature_extractor", "image_encoder")


def export_folder(options: ExportOptions) -> dict[str, Any]:
    """Export a model, or check an earlier export again; the report that `export.json` holds.

    Raises:
        RefusedInputError: the model, a LoRA or the output folder cannot be used.
        VerificationError: a graph does not do what torch does; the output folder is as it was.
    """
    options.check()
    output = Path(options.output).resolve()  # of a link, the folder that it leads to
    if not options.verify_only:
        check_place(output)
    recover(output)
    if options.verify_only:
        check_manifest(output)
        options = as_exported(options, output)
    else:
        check_output(output, options.overwrite)
    check_memory_to_load(options.model)
    job = ExportJob(options)
    if options.verify_only:
        return job.verify_folder(output)
    check_resources(job.weight_bytes(), output)
    with temporary_folder(output, options.keep_failed) as folder:
        report = job.write(folder)
        into_place(folder, output)
    return report


def as_exported(options: ExportOptions, output: Path) -> ExportOptions:
    """The options with which an earlier export was made, as far as its report tells; a tolerance asked for is kept.

    Raises:
        RefusedInputError: it was made with a LoRA or another autoencoder, of which it has only the name.
    """
    try:
        made = json.loads((output / REPORT).read_text(encoding="utf-8"))
        lora = " ".join(f"--lora {entry['file']}:{entry['scale']:g}" for entry in made["adapters"])
        needed = [(lora, options.lora), (f"--vae {made['vae']}" if made["vae"] else "", options.vae)]
        names = [name for name in COMPONENTS if name in made["precision"]]
        names += ["sampler"] if "unet/sampler.onnx" in made["files"] else []
        # The autoencoder's alone may be float32 in an export of half precision.
        precision = min(made["precision"].items(), key=lambda entry: entry[0].startswith("vae"))[1]
        tables = output / "unet/steps.json"
        counts = json.loads(tables.read_text(encoding="utf-8")) if "unet" in names else options.step_counts
        found = replace(
            options,
            components=",".join(names),
            precision=precision,
            steps=",".join(map(str, counts)),
            guidance=made["guidance"],
            with_vae=made["with_vae"],
            static=made["static"],
            unroll=made["unroll"],
            tolerance=made["tolerance"] if options.tolerance is None else options.tolerance,
        )
        found.check()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, RefusedInputError):
            raise
        raise RefusedInputError(f"{output / REPORT} is no report of an export: export again") from error
    for option, given in needed:
        if option and not given:
            raise RefusedInputError(f"{output} was exported with {option}: give it again, to verify against")
    return found


class ExportJob:
    """One model, loaded in float32 with its adapters merged, and what is to be made of it.

    Args:
        options: of the export.

    Raises:
        RefusedInputError: the model or an adapter cannot be used, or the options do not fit it.
    """

    def __init__(self, options: ExportOptions) -> None:
        self.options = options
        self.model = _load(options.model, options.vae)
        self.pipeline = self.model.pipeline
        self.adapters = [fuse_adapter(self.pipeline, path, scale) for path, scale in options.adapters]
        self.components = self._components()
        unet = self.model.unet.config
        self.guided = options.guidance
        if "sampler" in options.component_names and unet.in_channels != unet.out_channels:
            raise RefusedInputError(
                f"the network takes {unet.in_channels} channels and gives {unet.out_channels} (depth or inpainting):"
                " the sampler has no picture to condition on; leave sampler out of components"
            )
        self.tables = {steps: step_table(self.model.alignment, steps) for steps in options.step_counts}
        self.sizes = self._static_sizes()

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of each graph's weights as they will be written."""
        found = {}
        for component in self.components.values():
            size = DTYPES[self._precision(component.name)].itemsize
            found[component.name] = size * sum(p.numel() for p in component.module.parameters())
        return found

    def write(self, folder: Path) -> dict[str, Any]:
        """Fill the folder with checked graphs and everything beside them, and return the report."""
        options = self.options
        cases = self._cases() if not options.skip_verify else {}
        for component in self.components.values():
            component.module.to(DTYPES[self._precision(component.name)])
            place = folder / component.name
            place.mkdir()
            sizes = self.sizes.get(component.name)
            converted = graphs.convert(component, options.opset_version, sizes)
            graphs.save(converted, place / "model.onnx", external=component.name == "unet")
            del converted
            gc.collect()
            component.config.save_pretrained(place) if hasattr(component.config, "save_pretrained") else (
                place / "config.json"
            ).write_text(_config_json(component))
        for path, unroll in self._sampler_files(folder).items():
            write_sampler(
                path,
                folder / "unet" / "model.onnx",
                guidance=self.guided,
                unroll=unroll,
                vae=folder / "vae_decoder" / "model.onnx" if options.with_vae else None,
                scaling=self.model.vae.config,
            )
        if "unet" in self.components:
            write_tables(folder / "unet" / "steps.json", self.tables)
        self._write_pipeline(folder)
        # What torch had to say is in the cases: its weights would lie beside ONNX Runtime's copies of them.
        for component in self.components.values():
            component.module.to("meta")
        gc.collect()
        written = sorted(folder.glob("*/*.onnx"))
        for path in written:
            verify.check_structure(path)
        rows = self._compare(folder, cases)
        verify.check_rows(rows, options.largest_error)
        checked = {str(path.relative_to(folder)): readiness.check_readiness(path) for path in written}
        unready = {name: found["problems"] for name, found in checked.items() if not found["ready"]}
        if unready and options.target == "tensorrt":
            name, problems = next(iter(unready.items()))
            raise verify.VerificationError(f"{name} is not ready for TensorRT: {'; '.join(problems[:3])}")
        report = self._report(folder, rows, checked)
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        return report

    def verify_folder(self, folder: Path) -> dict[str, Any]:
        """Compare the graphs of an earlier export with the model, and return its report with the new figures."""
        made = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        rows = self._compare(folder, self._cases())
        verify.check_rows(rows, self.options.largest_error)
        return made | {"parity": rows}

    def _components(self) -> dict[str, Component]:
        pipeline, asked = self.pipeline, self.options.component_names
        found = []
        if "text_encoder" in asked:
            for name in ("text_encoder", "text_encoder_2"):
                encoder = getattr(pipeline, name, None)
                if encoder is not None:
                    found.append(text_encoder_component(encoder, name))
        if "unet" in asked:
            found.append(unet_component(pipeline.unet))
        found += [component for component in vae_components(pipeline.vae) if component.name in asked]
        return {component.name: component for component in found}

    def _precision(self, name: str) -> str:
        """Half precision overflows in the autoencoder, unless its configuration says that it does not."""
        if name.startswith("vae") and self.model.vae.config.get("force_upcast", True):
            return "fp32"
        return self.options.precision

    def _static_sizes(self) -> dict[str, dict[str, int]]:
        """Fixed sizes of each component's inputs, where the export is static."""
        static = self.options.static_sizes
        if static is None:
            return {}
        batch, *sides = static
        factor = self.model.downsampling
        step = factor * 2 ** (len(self.model.unet.config.block_out_channels) - 1)
        for name, size in zip(("height", "width"), sides, strict=True):
            if size < step or size % step:
                raise RefusedInputError(f"{name} {size} is not a multiple of {step}")
        height, width = sides
        length = self.pipeline.tokenizer.model_max_length
        latent = {"height": height // factor, "width": width // factor}
        decoded = {f"latent_{name}": size for name, size in latent.items()}
        return {
            "unet": {"batch": batch * (2 if self.guided else 1), "sequence": length, **latent},
            "text_encoder": {"batch": batch, "sequence": length},
            "text_encoder_2": {"batch": batch, "sequence": length},
            "vae_encoder": {"batch": batch, "height": height, "width": width},
            "vae_decoder": {"batch": batch, **decoded},
        }

    def _sampler_files(self, folder: Path) -> dict[Path, int]:
        """Sampler graphs, and the steps written out in each: 0 for the Loop."""
        if "sampler" not in self.options.component_names:
            return {}
        files = {folder / "unet" / "sampler.onnx": 0}
        if self.options.unroll:
            files[folder / "unet" / f"sampler_{self.options.unroll}.onnx"] = self.options.unroll
        return files

    def _cases(self) -> dict[str, list[verify.Case]]:
        """What torch makes of the inputs, in float32: before any module is cast."""
        cases = {name: verify.component_cases(c, self.sizes.get(name)) for name, c in self.components.items()}
        if "sampler" in self.options.component_names:
            sizes = self.sizes.get("unet")
            if sizes is not None and self.guided:
                sizes = sizes | {"batch": sizes["batch"] // 2}
            made = verify.sampler_cases(
                self.components["unet"],
                self.model.alignment,
                self.tables,
                self.guided,
                self._decode if self.options.with_vae else None,
                sizes,
            )
            cases["sampler"] = list(made.values())
        return cases

    def _decode(self, latents: Tensor) -> Tensor:
        config = self.model.vae.config
        unscaled = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
        return self.model.vae.decode(unscaled).sample

    def _compare(self, folder: Path, cases: dict[str, list[verify.Case]]) -> list[dict[str, Any]]:
        rows = []
        for name, found in cases.items():
            if name != "sampler":
                rows += verify.compare(folder / name / "model.onnx", found)
                continue
            for path, unroll in self._sampler_files(folder).items():
                fitting = [case for case in found if unroll in (0, len(case.inputs["timesteps"]))]
                rows += verify.compare(path, fitting)
        return rows

    def _write_pipeline(self, folder: Path) -> None:
        """model_index.json, the scheduler and the tokenizers: what optimum and diffusers load beside the graphs."""
        pipeline = self.pipeline
        config = {**pipeline.scheduler.config, **_STOCK_STEPS}
        config.pop("_use_default_values", None)
        # Marigold's pipelines never scale the network's input, as Euler's states need it.
        is_marigold = type(pipeline).__name__.startswith("Marigold")
        scheduler = (DDIMScheduler if is_marigold else EulerDiscreteScheduler).from_config(config)
        scheduler.save_pretrained(folder / "scheduler")
        for name in ("tokenizer", "tokenizer_2"):
            tokenizer = getattr(pipeline, name, None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder / name)
                # transformers before 5, which optimum uses, reads CLIP's tokenizer from these two.
                tokenizer.backend_tokenizer.model.save(str(folder / name))
        index: dict[str, Any] = {"_class_name": type(pipeline).__name__, "_diffusers_version": diffusers.__version__}
        for name, value in pipeline.config.items():
            if not name.startswith("_"):
                index[name] = [None, None] if name in _NOT_EXPORTED else value
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2, default=list) + "\n", encoding="utf-8")

    def _report(self, folder: Path, rows: list[dict[str, Any]], checked: dict[str, Any]) -> dict[str, Any]:
        options, alignment = self.options, self.model.alignment
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {
            "format": 1,
            "model": Path(options.model).name,
            "vae": None if options.vae is None else Path(options.vae).name,
            "adapters": self.adapters,
            "opset": options.opset_version,
            "target": options.target,
            "precision": {name: self._precision(name) for name in self.components},
            "prediction_type": alignment.prediction_type,
            "guidance": self.guided,
            "with_vae": options.with_vae,
            "unroll": options.unroll,
            "static": options.static,
            "verified": not options.skip_verify,
            "tolerance": options.largest_error,
            "parity": rows,
            "tensorrt": checked,
            "trtexec": self._trtexec(folder),
            "versions": {name: found for name in _PACKAGES if (found := _version(name))},
            "files": {
                path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
                for path in files
            },
        }

    def _trtexec(self, folder: Path) -> list[str]:
        """Engine commands for each graph, at half, once and one and a half times the model's own size."""
        factor, config = self.model.downsampling, self.model.unet.config
        step = 2 ** (len(config.block_out_channels) - 1)
        lines = []
        for path in sorted(folder.glob("*/*.onnx")):
            name = path.relative_to(folder).as_posix()
            halves = 2 if name == "unet/model.onnx" and self.guided else 1
            unit = factor if path.parent.name == "vae_encoder" else 1
            sizes = {}
            for axis, side in zip(("height", "width"), latent_sides(config), strict=True):
                sides = [unit * max(step, round(side * share / step) * step) for share in (0.5, 1, 1.5)]
                sizes[axis] = sizes[f"latent_{axis}"] = sides
            sizes |= {"batch": [halves, halves, 4 * halves], "sequence": [self.pipeline.tokenizer.model_max_length] * 3}
            sizes["steps"] = [1, 4, max(4, *self.tables)]
            lines.append(readiness.trtexec_line(name, readiness.profiles_of(path, sizes)))
        return lines


def _load(model: str, vae: str | None) -> BaseModel:
    found = BaseModel.load(model)
    for name in ("vae", "tokenizer", "text_encoder"):
        if getattr(found.pipeline, name, None) is None:
            raise ModelError(f"{model} has no {name}: give a whole Stable Diffusion pipeline")
    if vae is not None:
        found.pipeline.register_modules(vae=_load_vae(vae, found.vae))
        found = BaseModel(found.pipeline)
    if getattr(found.vae.config, "latents_mean", None) is not None:
        raise ModelError(f"{vae or model}: latents_mean of its autoencoder has no place in the ONNX folder's layout")
    return found


def _load_vae(vae: str, own: Any) -> Any:
    """An autoencoder of the same latents as the model's own."""
    if not Path(vae).is_dir() and (Path(vae).is_absolute() or vae.startswith(".")):
        raise ModelError(f"vae {vae} does not exist: give a hub id, or the folder of an autoencoder")
    try:
        found = AutoModel.from_pretrained(vae, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"vae {vae} cannot be loaded: {' '.join(str(error).split())}") from error
    if type(found).__name__ not in ("AutoencoderKL", "AutoencoderTiny"):
        raise ModelError(f"vae {vae} is a {type(found).__name__}: give an AutoencoderKL or an AutoencoderTiny")
    for name, new, old in (
        ("latent channels", found.config.latent_channels, own.config.latent_channels),
        ("pixels a latent", *(2 ** (len(one.config.block_out_channels) - 1) for one in (found, own))),
    ):
        if new != old:
            raise ModelError(f"vae {vae} has {new} {name}, the model's own {old}: it is of another model")
    return found


def _config_json(component: Component) -> str:
    config = {key: value for key, value in component.config.items() if key != "_use_default_values"}
    config["_diffusers_version"] = diffusers.__version__
    return json.dumps(config, indent=2, sort_keys=True, default=str) + "\n"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None

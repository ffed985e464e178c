"""Make the export folder: load, merge, trace, wrap and check, and only then rename it into place."""

import gc
import sys
from pathlib import Path

import torch
from torch import Tensor

from d2f_fast.errors import RefusedInputError
from d2f_fast.export import graphs, readiness, verify
from d2f_fast.export.engines import engine_commands
from d2f_fast.export.options import MODEL_OPTIONS, ExportOptions, check_sampler_network, check_steps_of_jump
from d2f_fast.export.output_folder import check_output, output_folder
from d2f_fast.export.output_place import check_place
from d2f_fast.export.pipeline_files import write_component_config, write_pipeline_files
from d2f_fast.export.readiness import Readiness
from d2f_fast.export.report import (
    REPORT,
    Report,
    check_manifest,
    list_files,
    options_of_export,
    package_versions,
    read_report,
)
from d2f_fast.export.resources import check_memory_to_load, check_resources
from d2f_fast.export.sampler_graph import write_sampler
from d2f_fast.export.source import guidance_of, is_marigold, load_model, sampling_of, text_length
from d2f_fast.export.step_tables import StepTable, step_table, trailing_table, write_tables
from d2f_fast.export.wrappers import Component, text_encoder_component, unet_component, vae_components
from d2f_fast.files.atomic import recover_folder
from d2f_fast.files.json_file import write_json
from d2f_fast.files.lock import locked_place
from d2f_fast.flow.alignment import Alignment
from d2f_fast.lora.merge import fuse_adapter
from d2f_fast.models.load import checked_source
from d2f_fast.models.marigold import settle_start
from d2f_fast.models.reflection_padding import set_reflection_padding
from d2f_fast.models.tags import take_trained_size

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export_folder(options: ExportOptions) -> Report:
    """Export a model, or check an earlier export again, and return the report that `export.json` holds.

    Raises:
        RefusedInputError: the options, the model, a LoRA or the output folder cannot be used.
        VerificationError: a graph does not compute what torch computes; the output folder is as it was.
    """
    options.check()
    output = Path(options.output).resolve()  # a link stays, and the folder that it leads to is written
    if options.verify_only:
        return _export(options, output)
    check_place(output)
    with locked_place(output):
        return _export(options, output)


def _export(options: ExportOptions, output: Path) -> Report:
    """Export to a folder that no other process writes, or check the export there."""
    recover_folder(output)
    if options.verify_only:
        check_manifest(output)
        options = options_of_export(options, output)
    else:
        check_output(output, options.overwrite)
    check_memory_to_load(options.model, options.variant)
    job = ExportJob(options)
    print(f"Model: {job.model.facts}", file=sys.stderr)
    if options.verify_only:
        return job.verify_folder(output)
    check_resources(job.weight_bytes(), output)
    with output_folder(output, options.keep_failed) as folder:
        return job.write(folder)


class ExportJob:
    """One model in float32, with its LoRAs merged, and the graphs that are to be made of it.

    Args:
        options: options that passed `ExportOptions.check`.

    Raises:
        RefusedInputError: the model or a LoRA cannot be used, or the options do not fit the model.
    """

    def __init__(self, options: ExportOptions) -> None:
        self.options = options
        source = checked_source(options.model, options.lora, options.model_options, options.shift)
        self.model = load_model(options.model, options.model_options)
        self.adapters = [fuse_adapter(self.model.pipeline, path, scale) for path, scale in options.adapters]
        adapters = [path for path, _ in options.adapters]
        take_trained_size(self.model.pipeline, source, adapters)
        sampling = sampling_of(self.model, source, adapters, options.shift)
        self.flow, self.shift, self.recommended_guidance, steps, reflects, self.starts_from_zeros, was_zeros = sampling
        if self.starts_from_zeros:
            check_steps_of_jump(options)
        settle_start(self.model.pipeline, was_zeros=was_zeros, from_zeros=self.starts_from_zeros, steps=steps)
        if reflects and options.vae_reflection_padding is None:
            set_reflection_padding(self.model.vae, True)
        self.components = self._components()
        unet = self.model.unet.config
        if "sampler" in options.component_names:
            check_sampler_network(unet.in_channels, unet.out_channels)
        self.guidance = guidance_of(self.model, options.guidance, options.image_guidance)
        self.recommended_steps = steps if steps in options.step_counts else None
        self.tables = {count: self._table(count) for count in options.step_counts}
        self.sizes = self._static_sizes()

    def weight_bytes(self) -> dict[str, int]:
        """Return the bytes of each graph's weights as they will be written."""
        found = {}
        for component in self.components.values():
            size = DTYPES[self._precision(component.name)].itemsize
            found[component.name] = size * sum(p.numel() for p in component.module.parameters())
        return found

    def write(self, folder: Path) -> Report:
        """Write the checked graphs and every other file into a folder, and return the report.

        The model's weights are released on the way, so that a job writes once.

        Args:
            folder: empty folder.

        Raises:
            RefusedInputError: an operator of the model has no ONNX form.
            VerificationError: a graph is not valid, differs from torch, or does not suit the target.
        """
        # torch's results come first, in float32: below, the modules are cast and then released.
        cases = self._cases() if not self.options.skip_verify else {}
        self._write_graphs(folder)
        self._write_samplers(folder)
        write_pipeline_files(folder, self.model.pipeline, self.flow, self.shift)
        for component in self.components.values():
            component.module.to("meta")  # torch's weights would lie in memory beside ONNX Runtime's copies of them
        gc.collect()
        for path in sorted(folder.glob("*/*.onnx")):
            verify.check_structure(path)
        rows = self._compare(folder, cases)
        verify.check_rows(rows, self.options.largest_error)
        report = self._report(folder, rows, self._check_readiness(folder))
        write_json(folder / REPORT, report)
        return report

    def verify_folder(self, folder: Path) -> Report:
        """Compare the graphs of an earlier export with the model, and return its report with the new rows.

        Args:
            folder: folder of the earlier export.

        Raises:
            VerificationError: a graph differs from torch.
        """
        rows = self._compare(folder, self._cases())
        verify.check_rows(rows, self.options.largest_error)
        report = read_report(folder)
        report["parity"] = rows
        return report

    def _table(self, steps: int) -> StepTable:
        """Return the table of a number of steps: those of the stock scheduler for a depth model without a shift."""
        if is_marigold(self.model.pipeline) and isinstance(self.flow, Alignment) and self.shift == 1:
            return trailing_table(self.flow, steps)
        return step_table(self.flow, steps, self.shift)

    def _components(self) -> dict[str, Component]:
        """Return the graphs that the options ask for, by name; a pipeline may have two text encoders."""
        pipeline, asked = self.model.pipeline, self.options.component_names
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
        """Return the precision of a component; most autoencoders overflow in half precision and stay in float32."""
        if name.startswith("vae") and self.model.vae.config.get("force_upcast", True):
            return "fp32"
        return self.options.precision

    def _static_sizes(self) -> dict[str, dict[str, int]]:
        """Return the fixed sizes of each component's inputs where the export is static, an empty mapping elsewhere."""
        static = self.options.static_sizes
        if static is None:
            return {}
        batch, *sides = static
        factor = self.model.downsampling
        step = factor * 2 ** (len(self.model.unet.config.block_out_channels) - 1)
        for name, size in zip(("height", "width"), sides, strict=True):
            if size < step or size % step:
                raise RefusedInputError(f"{name} {size} is not a multiple of {step}: choose one in --static")
        height, width = sides
        length = text_length(self.model.pipeline)
        latent = {"height": height // factor, "width": width // factor}
        decoded = {f"latent_{name}": size for name, size in latent.items()}
        return {
            "unet": {"batch": batch * self.guidance.copies, "sequence": length, **latent},
            "text_encoder": {"batch": batch, "sequence": length},
            "text_encoder_2": {"batch": batch, "sequence": length},
            "vae_encoder": {"batch": batch, "height": height, "width": width},
            "vae_decoder": {"batch": batch, **decoded},
        }

    def _write_graphs(self, folder: Path) -> None:
        for component in self.components.values():
            _say_part(f"exporting {component.name}/model.onnx")
            component.module.to(DTYPES[self._precision(component.name)])
            place = folder / component.name
            place.mkdir()
            converted = graphs.convert(component, self.options.opset_version, self.sizes.get(component.name))
            graphs.save(converted, place / "model.onnx", external=component.name == "unet")
            del converted
            gc.collect()
            write_component_config(place, component)

    def _write_samplers(self, folder: Path) -> None:
        for path, unroll in self._sampler_files(folder).items():
            _say_part(f"writing unet/{path.name}")
            write_sampler(
                path,
                folder / "unet" / "model.onnx",
                guidance=self.guidance,
                unroll=unroll,
                vae=folder / "vae_decoder" / "model.onnx" if self.options.with_vae else None,
                scaling=self.model.vae.config,
            )
        if "unet" in self.components:
            write_tables(folder / "unet" / "steps.json", self.tables)

    def _sampler_files(self, folder: Path) -> dict[Path, int]:
        """Return the paths of the sampler graphs, with the steps written out in each; 0 stands for the Loop."""
        if "sampler" not in self.options.component_names:
            return {}
        files = {folder / "unet" / "sampler.onnx": 0}
        if self.options.unroll:
            files[folder / "unet" / f"sampler_{self.options.unroll}.onnx"] = self.options.unroll
        return files

    def _cases(self) -> dict[str, list[verify.Case]]:
        """Return inputs of each graph with torch's outputs in float32; call it before any module is cast."""
        cases = {}
        for name, component in self.components.items():
            _say_part(f"computing torch's results of {name}")
            cases[name] = verify.component_cases(component, self.sizes.get(name))
        if "sampler" in self.options.component_names:
            _say_part("computing torch's results of the sampler")
            sizes = self.sizes.get("unet")
            if sizes is not None:
                sizes = sizes | {"batch": sizes["batch"] // self.guidance.copies}
            made = verify.sampler_cases(
                self.components["unet"],
                self.flow,
                self.tables,
                self.guidance,
                self._decode if self.options.with_vae else None,
                sizes,
            )
            cases["sampler"] = list(made.values())
        return cases

    def _decode(self, latents: Tensor) -> Tensor:
        config = self.model.vae.config
        unscaled = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
        image: Tensor = self.model.vae.decode(unscaled).sample
        return image

    def _compare(self, folder: Path, cases: dict[str, list[verify.Case]]) -> list[verify.Row]:
        rows = []
        for name, found in cases.items():
            if name != "sampler":
                _say_part(f"comparing {name}/model.onnx with torch")
                rows += verify.compare(folder / name / "model.onnx", found)
                continue
            for path, unroll in self._sampler_files(folder).items():
                _say_part(f"comparing unet/{path.name} with torch")
                fitting = [case for case in found if unroll in (0, len(case.inputs["timesteps"]))]
                rows += verify.compare(path, fitting)
        return rows

    def _check_readiness(self, folder: Path) -> dict[str, Readiness]:
        """Check each graph for TensorRT, and refuse one that is not ready where TensorRT is the target."""
        checked = {
            path.relative_to(folder).as_posix(): readiness.check_readiness(path)
            for path in sorted(folder.glob("*/*.onnx"))
        }
        for name, found in checked.items():
            if not found["ready"] and self.options.target == "tensorrt":
                raise verify.VerificationError(f"{name} is not ready for TensorRT: {'; '.join(found['problems'][:3])}")
        return checked

    def _report(self, folder: Path, rows: list[verify.Row], checked: dict[str, Readiness]) -> Report:
        options = self.options
        return {
            "format": 1,
            "model": Path(options.model).name,
            "vae": None if options.vae is None else Path(options.vae).name,
            "adapters": self.adapters,
            "opset": options.opset_version,
            "target": options.target,
            "precision": {name: self._precision(name) for name in self.components},
            "prediction_type": self.flow.prediction_type,
            "shift": self.shift,
            "taken_for": str(self.model.facts),
            "model_options": {name: value for name in MODEL_OPTIONS if (value := getattr(options, name)) is not None},
            "guidance": self.guidance.text,
            "image_guidance": self.guidance.image,
            "recommended_guidance": self.recommended_guidance,
            "recommended_steps": self.recommended_steps,
            "start": "zeros" if self.starts_from_zeros else None,
            "with_vae": options.with_vae,
            "unroll": options.unroll,
            "static": options.static,
            "verified": not options.skip_verify,
            "tolerance": options.largest_error,
            "parity": rows,
            "tensorrt": checked,
            "trtexec": engine_commands(folder, self.model, self.guidance.copies, options.step_counts),
            "versions": package_versions(),
            "files": list_files(folder),
        }


def _say_part(part: str) -> None:
    """Print which part of the export begins, because a part may take minutes."""
    print(part, file=sys.stderr, flush=True)
